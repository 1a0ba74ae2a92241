# Functions of the launch scripts; sourced, not run.

# Prints the comment at the top of the script and exits with status 2.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# require NAME WHAT: exits with status 2 if the environment variable NAME is not set.
require() {
  [ -n "${!1:-}" ] ||
    { echo "$0: $1 is not set; expected $2; put $1=... before the command" >&2; exit 2; }
}

# Prints its arguments as one line, quoted for the shell.
quoted() {
  local line
  line=$(printf '%q ' "$@")
  echo "${line% }"
}

# wait_for PID: returns its status, also if a signal ends `wait` while the run is still saving.
wait_for() {
  local status
  wait "$1"
  status=$?
  while kill -0 "$1" 2>/dev/null; do
    wait "$1"
    status=$?
  done
  return "$status"
}
