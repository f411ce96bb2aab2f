#!/bin/sh
# Runs both processes of the server in one terminal; Ctrl-C ends them. A process that ends, whatever
# its status, is restarted until this script is ended: after RESTART_S seconds (3), doubled each time
# up to RESTART_MAX_S (60), and reset after it has run for ten minutes. RESTARTS=3 gives up after three
# short-lived starts. Runs continue with a restarted SuperLink; a run whose app has ended is resumed
# with resume=. To start at boot, see systemd/.
set -u
here="$(cd "$(dirname "$0")" && pwd)"
ended=no
keep() { # keep SCRIPT NAME: start it, again whenever it ends
  child= failures=0 pause=${RESTART_S:-3}
  trap 'ended=yes; kill $child 2>/dev/null' INT TERM HUP
  while [ $ended = no ]; do
    started=$(date +%s)
    "$here/$1" &
    child=$!
    wait $child
    status=$?
    [ $ended = yes ] && break
    [ $(($(date +%s) - started)) -gt 600 ] && failures=0 pause=${RESTART_S:-3}
    failures=$((failures + 1))
    [ -n "${RESTARTS:-}" ] && [ $failures -gt "$RESTARTS" ] && break
    echo "start.sh: the $2 ended with status $status, starting it again in $pause s" \
      "($failures in a row)" >&2
    sleep $pause &
    wait $!
    pause=$((pause * 2))
    [ $pause -gt "${RESTART_MAX_S:-60}" ] && pause=${RESTART_MAX_S:-60}
  done
  wait $child 2>/dev/null
  [ $ended = yes ] && exit 0
  [ $status = 0 ] && exit 1
  exit $status
}
keep start-superexec.sh SuperExec &
superexec=$!
keep start-superlink.sh SuperLink &
superlink=$!
end() {
  ended=yes
  kill $superlink $superexec 2>/dev/null
}
trap end INT TERM HUP
# Ends with the SuperLink; if the SuperExec has ended, waits for the operator.
wait $superlink
status=$?
kill $superlink $superexec 2>/dev/null
wait
[ $ended = yes ] && exit 0
exit $status
