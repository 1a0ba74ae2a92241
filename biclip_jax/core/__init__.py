"""What every other package builds on: errors, files, configs, devices, the process."""
