#!/bin/sh
# Both parts of the server in one terminal: Ctrl-C ends them. One that dies is started again: a run
# goes on under a new SuperLink; one whose app has died goes on with resume=. For a machine that
# boots without you, see systemd/.
set -u
here="$(cd "$(dirname "$0")" && pwd)"
ended=no
keep() { # keep SCRIPT NAME: start it, again whenever it dies, five times at most
  child= attempt=0
  trap 'ended=yes; kill $child 2>/dev/null' INT TERM HUP
  while [ $attempt -lt 5 ] && [ $ended = no ]; do
    attempt=$((attempt + 1))
    "$here/$1" &
    child=$!
    wait $child
    status=$?
    [ $ended = yes ] && break
    echo "start.sh: the $2 ended with status $status (start $attempt of 5)" >&2
    sleep 3 &
    wait $!
  done
  wait $child 2>/dev/null
  [ $ended = yes ] && exit 0
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
