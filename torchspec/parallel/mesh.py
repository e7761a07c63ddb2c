"""The process group of a run's training ranks, and their mesh.

The mesh has three dimensions, ``("dp", "ring", "ulysses")``: data-parallel replicas and, inside each, the ranks that
share its samples (``shards.py``). Neighbours in number are Ulysses ranks, which exchange the most. A group
exists for one rank too, so the step loop needs no special case.

The weights do not follow the mesh. Every rank's gradient is a part of one sum, whether it comes from other samples or
from other positions of the same ones, so FSDP2 shards over all ranks, and where each rank keeps the whole draft its
gradients are summed over all.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchspec.network import address_towards, interface_of
from torchspec.shards import ShardFormula


@dataclass(frozen=True)
class Sharing:
    """How samples are shared among ranks, and with whom."""

    formula: ShardFormula
    mesh: DeviceMesh
    """Of :func:`build_mesh`."""
    gather_once: bool


def join_ranks(rank: int, world_size: int, address: str, port: int, device: torch.device, stuck_seconds: float) -> None:
    """Meet the other ranks at ``address:port``; rank 0 binds it, and nothing wider.

    Who waits for the others longer than ``stuck_seconds``, here or in a collective, fails.

    Collectives of CPU tensors go over gloo, of CUDA tensors over NCCL, both in the network of ``address``.
    """
    # They would choose an interface by the host's name otherwise, which need not be one that the others can reach.
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface_of(address_towards(address))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=stuck_seconds)
    store = _rendezvous(rank, world_size, address, port, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def build_mesh(device: torch.device, ulysses_size: int, ring_size: int) -> DeviceMesh:
    """The mesh of all ranks, once they have met.

    Raises:
        ValueError: the number of ranks is not a multiple of ``ulysses_size * ring_size``.
    """
    world_size = dist.get_world_size()
    sp_size = ulysses_size * ring_size
    if world_size % sp_size:
        raise ValueError(
            f"training.sp_ulysses_size={ulysses_size} times training.sp_ring_size={ring_size} is {sp_size}, which does "
            f"not divide the {world_size} training ranks"
        )
    shape = world_size // sp_size, ring_size, ulysses_size
    return init_device_mesh(device.type, shape, mesh_dim_names=("dp", "ring", "ulysses"))


def shard_module(module: nn.Module, units: Sequence[nn.Module], device: torch.device) -> None:
    """Shard ``module`` over all ranks with FSDP2, in place; a single rank keeps it plain.

    Each of ``units`` is gathered by itself, while it runs, and the rest of the module once a micro-batch. Gradients are
    summed, not averaged (the loss is a sum until the step scales it by the global count). A parameter without gradient
    on this rank takes part with zeros, so a rank's masks never change the collectives.
    """
    if dist.get_world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*units, module):
        sharded = fully_shard(part, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_reduce_scatter_unused_params(True)


def _rendezvous(rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> TCPStore:
    if rank != 0:
        return TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    # TCPStore binds all interfaces when left to itself, so it is given a socket that is already bound
    listener = socket.create_server((address, port))
    return TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())
