"""Process groups: started once here, handed to everything else as an argument."""

import gc
import math
import os
import platform
import resource
import socket
import time
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.device import on_gpu
from longred_megatron.errors import UserError, first_few
from longred_megatron.layout import Parallel
from longred_megatron.parallel import cpu_shim

FILES = 1 << 16  # that a process may open


def initialize(
    parallel: Parallel, seed: int, timeout: timedelta = timedelta(minutes=30), alone: bool = False
) -> ProcessGroupCollection:
    """Joins the world torchrun describes (or one of this process, if there is none) and cuts it into Megatron's groups.

    alone: a world of this process, whatever the environment says.

    NCCL on GPUs, gloo otherwise. Also seeds Megatron's random states.

    Raises:
        UserError: the ranks cannot meet where the environment says, or some are on GPUs and some on CPUs.
    """
    cpu_shim.install()
    if not torch.distributed.is_initialized():
        gpu = on_gpu()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        alone = alone or "RANK" not in os.environ  # started without torchrun
        if not alone:
            _check_address(os.environ["MASTER_ADDR"])
        _allow_sockets()
        try:
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo",
                timeout=timeout,
                store=torch.distributed.HashStore() if alone else None,
                rank=0 if alone else -1,
                world_size=1 if alone else -1,
            )
        except (torch.distributed.DistError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"the ranks cannot meet at MASTER_ADDR:MASTER_PORT, {where} ({str(error).splitlines()[0]}); "
                "start them with torchrun, or with another free port"
            ) from error
        _check_same_device(gpu)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def _allow_sockets() -> None:
    """gloo connects each rank with each of its group: with 1,000 ranks these are more sockets than the files that a
    process may open by default. Raises that number as far as this user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_same_device(gpu: bool) -> None:
    """Collectives of CPU and GPU tensors would wait for each other until the groups' limit is over."""
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    # On the CPU of every rank: NCCL would not do between different devices.
    world = torch.distributed.new_group(backend="gloo")
    torch.distributed.all_gather_object(ranks, (platform.node(), gpu), world)
    torch.distributed.destroy_process_group(world)
    without = [f"rank {rank} on {host}" for rank, (host, has) in enumerate(ranks) if not has]
    if 0 < len(without) < len(ranks):
        raise UserError(
            f"{first_few(without)}: no GPU, or no Transformer Engine that can be imported, while other ranks "
            "have both; mend these machines (tools/launch/check_environment.py), or set LONGRED_DEVICE=cpu everywhere"
        )


def _check_address(host: str) -> None:
    """torch asks for the address of an unknown host until the groups' limit, half an hour, is over."""
    for attempt in range(5):
        try:
            socket.getaddrinfo(host, None)
            return
        except (socket.gaierror, UnicodeError) as error:
            if attempt == 4:
                raise UserError(f"MASTER_ADDR={host!r}: no such host ({error}); start ranks with torchrun") from None
            time.sleep(1)  # a name server that is not up yet


def destroy() -> None:
    """Leaves the world, so that another layout can be started in this process."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # A model and its optimizer refer to each other and to their groups, whose gloo threads poll until they are gone.
    gc.collect()
