#!/bin/sh
# Starts the server's app when a run is submitted. It is a process of its own, so that a run goes
# on while the SuperLink restarts. Runs write into outputs/ of this directory.
set -eu
umask 077
cd "$(dirname "$0")"
if [ -z "${LOGGED:-}" ]; then # every line gets a time, and is kept in logs/
  LOGGED=yes exec @{python} -P -m fedllm_flwr.deployment.logged logs/superexec.log \
    /bin/sh "./start-superexec.sh" "$@@"
fi
unset LOGGED
export PATH=@{bin}:"$PATH" FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1
# gRPC would ask a proxy even for this machine's own address.
export no_proxy="@{unproxied}${no_proxy:+,$no_proxy}"
# The package runs Flower's program so that a run's token is on no command line.
exec @{python} -P -m fedllm_flwr.deployment.programs flower-superexec --plugin-type serverapp --insecure \
  --superexec-auth-secret-file superexec.secret \
  --health-server-address @{superexec_health} \
  --appio-api-address @{appio} --control-api-address @{control} \
  "$@@"
