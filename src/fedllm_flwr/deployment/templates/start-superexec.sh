#!/bin/sh
# Starts the server's app when a run is submitted. It is a separate process, so that runs continue
# while the SuperLink restarts. Runs write to outputs/ in this directory.
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
# gRPC would use a proxy even for this machine's own address.
export no_proxy="@{unproxied}${no_proxy:+,$no_proxy}"
# The package runs Flower's program without a run's token on the command line.
exec @{python} -P -m fedllm_flwr.deployment.programs flower-superexec --plugin-type serverapp --insecure \
  --superexec-auth-secret-file superexec.secret \
  --health-server-address @{superexec_health} \
  --appio-api-address @{appio} --control-api-address @{control} \
  "$@@"
