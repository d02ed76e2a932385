"""Ways to train one Llama, to stand side by side: plain PyTorch, memplan's engine, and its peers where installed.

All begin with the same weights and train in bf16 with AdamW and every layer recomputed. What each keeps in fp32 is its
own: the engine and plain PyTorch exact masters, DeepSpeed and FSDP2 too, torchao none.
"""

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.common import llama
from offload.engine import Engine
from offload.plan import Buckets, Budget, Placement, Plan, Precision, Prediction, StateFormat, Tier
from offload.residency import streamed_slot_bytes
from offload.split import TRIES

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
G, H, N = Tier.GPU, Tier.HOST, Tier.NVME
PIECE_ELEMENTS = 1 << 23
"""Of an update that the GPU shares: 16 to 32 MiB a copy."""

Step = Callable[[torch.Tensor], torch.Tensor]
"""One optimizer step on the tokens of its micro-batches; the loss of the last."""
System = Callable[[Namespace], Step]


def _recomputed(args: Namespace, device: str, dtype: torch.dtype) -> nn.Module:
    """A causal language model as people train it."""
    model = llama(args.model).to(device=device, dtype=dtype)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def world_size() -> int:
    """Processes that train together; one where nobody said it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _micro_batches(args: Namespace, tokens: torch.Tensor) -> list[torch.Tensor]:
    return list(tokens.chunk(args.accumulation))


def plain(args: Namespace) -> Step:
    """The loop people write: bf16 weights, fp32 masters, fused AdamW where there is one."""
    model = llama(args.model)
    masters = [p.detach().clone() for p in model.parameters()]
    model.to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, fused=torch.cuda.is_available(), **ADAMW)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        for part in _micro_batches(args, tokens):
            loss = model(input_ids=part, labels=part).loss
            (loss / args.accumulation).backward()
        if args.clip:
            torch.nn.utils.clip_grad_norm_(weights, args.clip)
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        for master in masters:
            master.grad = None
        return loss

    return step


@dataclass(frozen=True)
class Tiers:
    """The engine, and where it keeps a Llama; without clipping it updates in backward, where it is alone.

    Of several processes each trains its part of the batch, in stage 3.

    The root unit (the embedding) is in use all through a step and has a place on the device for that anyway: where
    nothing else is said its weights and gradients stay there. Its state is where that of the layers is.
    """

    layers: tuple[Tier, Tier, Tier]
    """Parameters, gradients, optimizer state of all but the resident ones."""
    resident: float = 0.0
    """The part of the layers that stay on the device whole: the first ones, which the next forward asks for first."""
    share: float = 0.0
    """The device's of the update of the host's state."""
    share_in_backward: float = 0.4
    """The same without clipping: the update need not be faster than backward then, and the links have weights too."""
    ahead: bool = False
    """Whether ``--update-gb`` of the device's memory are for state that comes while backward runs."""
    gradients_there: float = 0.0
    """The part of the layers, the first ones, whose gradients have a place on the device and none on the host; with
    clipping. The device's update needs those of its share."""
    loss_chunks: int = 1
    checkpoints: Tier = Tier.GPU
    root: tuple[Tier, Tier] = (G, G)
    """The root unit's parameters and gradients."""

    @property
    def learning_steps(self) -> int:
        """Steps until the share has settled: [Note: tries] in ``offload.split``."""
        return 2 * TRIES if self.share else 0

    def plan(self, args: Namespace, model: nn.Module) -> Plan:
        """For the benchmark's batch and options."""
        layers = [f"model.layers.{i}" for i in range(len(model.model.layers))]
        resident = round(self.resident * len(layers))
        parameters, gradients, state = self.layers
        share = self.share if args.clip else min(self.share, self.share_in_backward)
        slots = round(args.update_gb * 1e9 / streamed_slot_bytes(PIECE_ELEMENTS, StateFormat(Precision.BF16)))
        buckets = Buckets(prefetch_units=2)
        if share:
            buckets = replace(buckets, update_elements=PIECE_ELEMENTS, update_slots=max(3, slots) if self.ahead else 3)
        there = round(self.gradients_there * (len(layers) - resident)) if args.clip else 0

        def placed(number: int) -> Placement:
            if number < resident:
                return Placement(layers[number], G, G, G)
            kept = G if number < resident + there else gradients
            return Placement(layers[number], parameters, kept, state)

        return Plan(
            model=args.model,
            parameter_shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
            precision=Precision.BF16,
            device=_device(),
            gpus=world_size(),
            zero_stage=3 if world_size() > 1 else 0,
            placements=(Placement("", *self.root, state), *map(placed, range(len(layers)))),
            buckets=buckets,
            micro_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulation,
            recompute=tuple(layers),
            budget=Budget(1 << 40, 1 << 40, 1 << 40),
            prediction=Prediction(0, 0, 0, 0, None, None),
            nvme_dir=str(args.nvme),
            checkpoints=self.checkpoints,
            gpu_update_share=share,
            loss_chunks=self.loss_chunks,
        )

    def engine(self, args: Namespace) -> Engine:
        """With the benchmark's model in it."""
        alone = world_size() == 1
        if not alone:
            dist.init_process_group("gloo")  # for GPUs the engine makes groups of its own
        model = llama(args.model)
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        early = not args.clip and self.layers[2] is not G and alone
        plan = self.plan(args, model)
        return Engine(model, plan, optimizer, max_grad_norm=args.clip or None, update_in_backward=early)

    def __call__(self, args: Namespace) -> Step:
        """A training step."""
        return _by_engine(args, self.engine(args))


def deepspeed_offloaded(args: Namespace) -> Step:
    """DeepSpeed's stage 3 with parameters and optimizer on the host, with its documented settings."""
    import deepspeed

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    host = {"device": "cpu", "pin_memory": True}
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_accumulation_steps": args.accumulation,
        "bf16": {"enabled": True},
        "gradient_clipping": args.clip,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 10**9,
            "stage3_max_live_parameters": 10**9,
            "stage3_prefetch_bucket_size": 5 * 10**7,
            "stage3_param_persistence_threshold": 10**5,
            "offload_param": host,
            "offload_optimizer": host,
        },
        "optimizer": {"type": "AdamW", "params": ADAMW},
    }
    model = _recomputed(args, _device(), torch.bfloat16)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    return _by_engine(args, engine)


def fsdp2(*, offloaded: bool) -> System:
    """FSDP2 with fp32 shards, on the device or by its policy of offloading on the host, and bf16 computation."""

    def system(args: Namespace) -> Step:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        how: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
            if offloaded:
                how["offload_policy"] = CPUOffloadPolicy()
        else:  # nowhere to offload from; the mesh is otherwise one of accelerators
            dist.init_process_group("gloo")
            how["mesh"] = init_device_mesh("cpu", (world_size(),))
        model = _recomputed(args, "cpu" if offloaded else _device(), torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, **how)
        fully_shard(model, **how)
        return _with_adamw(args, model, torch.optim.AdamW(model.parameters(), fused=True, **ADAMW))

    return system


def torchao_offloaded(args: Namespace) -> Step:
    """torchao's CPUOffloadOptimizer: weights stay on the GPU, bf16 state without masters, no clipping."""
    from torchao.optim import CPUOffloadOptimizer

    model = _recomputed(args, _device(), torch.bfloat16)
    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, fused=True, **ADAMW)
    return _with_adamw(Namespace(**{**vars(args), "clip": 0.0}), model, optimizer)


def _by_engine(args: Namespace, engine: Any) -> Step:
    """Of an engine that accumulates and clips by itself: DeepSpeed's, or memplan's, which is called alike."""

    def step(tokens: torch.Tensor) -> torch.Tensor:
        for part in _micro_batches(args, tokens):
            loss = engine(input_ids=part, labels=part).loss
            engine.backward(loss)
            engine.step()
        return loss

    return step


def _with_adamw(args: Namespace, model: nn.Module, optimizer: Any) -> Step:
    def step(tokens: torch.Tensor) -> torch.Tensor:
        for part in _micro_batches(args, tokens):
            loss = model(input_ids=part, labels=part).loss
            (loss / args.accumulation).backward()
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


CHUNKED = Tiers((H, H, H), share=0.55, ahead=True, gradients_there=0.55, loss_chunks=16, checkpoints=H, root=(H, G))
"""What a small GPU has room for: the loss in pieces, inputs of blocks on the host."""

SYSTEMS: dict[str, System] = {
    "plain": plain,
    "resident": Tiers((G, G, G)),
    "optimizer-host": Tiers((G, H, H)),
    "host": Tiers((H, H, H)),
    "host-shared": Tiers((H, H, H), share=0.35),
    "host-ahead": Tiers((H, H, H), share=0.6, ahead=True, gradients_there=0.6),
    "all-host-ahead": Tiers((H, H, H), share=0.6, ahead=True, gradients_there=0.6, root=(H, G)),
    "host-ahead-chunked": CHUNKED,
    "host-ahead-chunked-less-host": replace(CHUNKED, gradients_there=0.9),
    "least": Tiers((H, H, H), loss_chunks=16, checkpoints=H, root=(H, H)),
    "gpu-and-host": Tiers((H, H, H), resident=0.5, share=0.55, ahead=True, gradients_there=0.55, loss_chunks=16),
    "optimizer-nvme": Tiers((H, H, N)),
    "deepspeed": deepspeed_offloaded,
    "fsdp2": fsdp2(offloaded=True),
    "fsdp2-resident": fsdp2(offloaded=False),
    "torchao": torchao_offloaded,
}


def warm_up_steps(args: Namespace, system: System) -> int:
    """Steps that are not timed: those asked for, and those in which an engine's share of the update settles."""
    return args.warm_up + (system.learning_steps if isinstance(system, Tiers) and args.clip else 0)


def one_process() -> None:
    """What peers on torch.distributed want to know of a process that is alone."""
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
