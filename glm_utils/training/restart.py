"""The process group of a run whose processes torchrun has started again."""

import datetime
import os

import torch
from torch import distributed


def join_after_restart(use_cpu: bool, backend: str | None, timeout_seconds: int) -> None:
    """Join the group under keys of this attempt; without a restart, accelerate does it.

    torchrun keeps one store over all attempts, and PyTorch's keys in it do not name the attempt: a process that is
    early finds the addresses of those that are gone, and waits for them for ever. Source: torch 2.13,
    distributed/rendezvous.py, `_create_c10d_store`, and elastic/rendezvous/dynamic_rendezvous.py, `next_rendezvous`.

    Args:
        use_cpu: Whether the run uses no GPU.
        backend: ddp_backend of the settings; None: the usual one.
        timeout_seconds: ddp_timeout of the settings.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not attempt or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or distributed.is_initialized():
        return
    world_size, timeout = int(os.environ["WORLD_SIZE"]), datetime.timedelta(seconds=timeout_seconds)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(*address, world_size, is_master=False, timeout=timeout)
    distributed.init_process_group(
        backend or ("gloo" if use_cpu or not torch.cuda.is_available() else "nccl"),
        store=distributed.PrefixStore(f"attempt_{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        timeout=timeout,
    )
