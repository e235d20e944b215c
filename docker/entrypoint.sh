#!/bin/sh
# What every container of both images starts with: the environment of all launch scripts, then its command.
set -eu
# shellcheck source=tools/launch/environment.sh
. /opt/longred-megatron/tools/launch/environment.sh
exec "$@"
