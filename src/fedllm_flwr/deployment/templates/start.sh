#!/bin/sh
# Both parts of the server in one terminal: Ctrl-C ends them. One that ends, with whatever status, is
# started again, until this script is ended: after RESTART_S seconds (3), twice as long each time up
# to RESTART_MAX_S (60), from the beginning once it has run for ten minutes. RESTARTS=3 gives up
# after three starts that did not last. A run goes on under a new SuperLink; one whose app has died
# goes on with resume=. For a machine that boots without you, see systemd/.
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
# Without a SuperLink nothing works; without a SuperExec it waits for the operator.
wait $superlink
status=$?
kill $superlink $superexec 2>/dev/null
wait
[ $ended = yes ] && exit 0
exit $status
