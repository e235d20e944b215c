# shellcheck shell=sh
# The environment of a run, for every way to start one: the launch scripts beside this file and the images read it.
# Before a `torchrun` by hand:
#
#   . tools/launch/environment.sh
#
# What is set already stays.

# Megatron starts communication and computation in an order that overlaps; one hardware queue keeps it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# A step's objectives ask for tensors of many sizes; segments that can grow leave fewer holes between them.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# NCCL (GPUs) and gloo (CPUs, and small messages beside NCCL) each choose a network interface. Where a machine has
# several and they choose wrongly (ranks wait for each other at the start, or all-reduce is slow), INTERFACE=eth0 names
# it for both. It is the one over which ranks find each other; InfiniBand is found by NCCL itself (NCCL_IB_HCA names
# its adapters). NCCL_DEBUG=INFO prints what NCCL chose.
if [ -n "${INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME="$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"
fi
