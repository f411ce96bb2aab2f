#!/bin/sh
# The SuperLink, to which sites connect. Its state is in superlink.db and survives a restart.
set -eu
umask 077
cd "$(dirname "$0")"
if [ -z "${LOGGED:-}" ]; then # every line gets a time, and is kept in logs/
  LOGGED=yes exec @{python} -P -m fedllm_flwr.deployment.logged logs/superlink.log \
    /bin/sh "./start-superlink.sh" "$@@"
fi
unset LOGGED
export PATH=@{bin}:"$PATH" FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1
# Flower keeps all runs forever. Results in outputs/ are not removed.
if [ -e superlink.db ]; then
  fedllm server prune "$PWD" --days "${KEEP_RUNS_DAYS:-90}" || true
fi
# flower-superlink with a longer timeout for its database than Flower's (5 s).
exec @{python} -P -m fedllm_flwr.deployment.superlink \
  --database superlink.db \
  --isolation process --superexec-auth-secret-file superexec.secret \
  --serverappio-api-address @{appio} \
  --control-api-address @{control} \
  --fleet-api-address @{fleet} \
  --health-server-address @{superlink_health} \
  @{security} \
  "$@@"
