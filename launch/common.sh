# What the launch scripts share; sourced, not run.

# Prints the comment at the head of the script.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# require NAME WHAT: ends the script where the environment has no NAME.
require() {
  [ -n "${!1:-}" ] ||
    { echo "$0: $1 is not set; expected $2; put $1=... before the command" >&2; exit 2; }
}

# One line that a shell reads as the same words.
quoted() {
  local line
  line=$(printf '%q ' "$@")
  echo "${line% }"
}

# wait_for PID: its status, also where a signal ends `wait` early and the run is still saving.
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
