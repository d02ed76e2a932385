"""Every file is read by the parser of the program it is for."""

import json
import os
import re
import runpy
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import yaml
from hypothesis import given, settings
from torch.distributed.fsdp import FSDPModule
from torch.distributed.run import get_args_parser
from torch.testing._internal.distributed.fake_pg import FakeStore

from memplan.configs.files import NOTES, block_classes_of, configurations
from offload.plan import OptimizerKind, Placement, Plan, Precision, Target, Tier
from tests.net_plans import AWAY, DEEPSPEED, HYBRID, OFFLOADED, PLAN, UNITS, H, Net, plans
from tests.plans import RESIDENT


def written(plan: Plan, folder: Path, *block_classes: str) -> Path:
    for name, text in configurations(plan, block_classes).items():
        (folder / name).write_text(text)
    return folder


def by_accelerate(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``accelerate launch`` makes of the file, as the environment of its ranks."""
    launch = pytest.importorskip("accelerate.commands.launch")
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    # The port is only looked at, but another program of this machine may have it.
    arguments = ["--config_file", str(file), "--main_process_port", "0", "train.py"]
    args, _, from_file = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = "mixed_precision" if from_file else ""
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    assert int(args.nproc_per_node) * int(args.num_machines) == int(args.num_processes)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize(
    ("plan", "offload", "reshard"),
    [
        (PLAN, False, True),
        (OFFLOADED, True, True),
        (replace(OFFLOADED, gpus=1), True, True),
        (replace(PLAN, zero_stage=2), False, False),
        (HYBRID, False, True),
    ],
)
def test_accelerate_launch_takes_the_plan_for_fsdp2(plan, offload, reshard, tmp_path, monkeypatch):
    by_accelerate(written(plan, tmp_path, "Block") / "accelerate-fsdp2.yaml", monkeypatch)
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is reshard
    assert (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy") is offload
    assert plugin.activation_checkpointing
    assert not plugin.activation_checkpointing_offload
    assert plugin.transformer_cls_names_to_wrap == ["Block"]
    plugin.set_auto_wrap_policy(Net())
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if plan is HYBRID:
        degrees = ParallelismConfig()
        assert (degrees.dp_replicate_size, degrees.dp_shard_size) == (2, 8)


def test_checkpoints_on_the_host_are_said_to_accelerate(tmp_path, monkeypatch):
    by_accelerate(written(replace(PLAN, checkpoints=H), tmp_path) / "accelerate-fsdp2.yaml", monkeypatch)
    from accelerate.utils import FullyShardedDataParallelPlugin

    assert FullyShardedDataParallelPlugin().activation_checkpointing_offload


@pytest.mark.parametrize("nodes", [1, 2])
def test_accelerate_launch_takes_the_plan_for_deepspeed(nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(written(replace(DEEPSPEED, nodes=nodes), tmp_path))
    by_accelerate(tmp_path / "accelerate-deepspeed.yaml", monkeypatch)
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 3
    assert plugin.zero3_init_flag
    assert plugin.gradient_accumulation_steps == 3
    assert plugin.offload_optimizer_device == plugin.offload_param_device == "cpu"


def arguments_of(plan: Plan, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """TrainingArguments as a script reads them, but on the CPU, with as many ranks as the plan wants."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(written(plan, folder, "Block"))
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda self: plan.gpus))
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_cpu": True, "output_dir": str(folder)}))
    (found,) = transformers.HfArgumentParser((transformers.TrainingArguments,)).parse_json_file(str(file))
    return found


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*deprecated:FutureWarning")
def test_training_arguments_take_the_plan_for_deepspeed(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    found = arguments_of(DEEPSPEED, "huggingface-deepspeed.json", tmp_path, monkeypatch)
    assert found.gradient_checkpointing
    assert found.bf16
    config = found.hf_deepspeed_config
    assert config.is_zero3()
    assert config.is_offload()
    assert found.train_batch_size == 2
    assert found.gradient_accumulation_steps == 3


@pytest.mark.parametrize(("plan", "offload"), [(PLAN, None), (OFFLOADED, True)])
def test_training_arguments_take_the_plan_for_fsdp2(plan, offload, tmp_path, monkeypatch):
    found = arguments_of(plan, "huggingface-fsdp2.json", tmp_path, monkeypatch)
    assert found.fsdp_plugin_args["fsdp_version"] == 2
    assert found.fsdp_plugin_args["reshard_after_forward"] is True
    assert found.fsdp_plugin_args.get("cpu_offload") is offload
    assert found.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "Block"
    assert found.fsdp_plugin_args["activation_checkpointing"]
    assert found.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
    assert (found.train_batch_size, found.gradient_accumulation_steps, found.max_grad_norm) == (2, 3, 1.0)


def test_lightning_takes_the_plan_for_fsdp2(tmp_path):
    pytest.importorskip("lightning")
    module = runpy.run_path(str(written(HYBRID, tmp_path) / "lightning_fsdp2.py"))
    trainer = module["trainer"](module["strategy"](), accelerator="cpu", logger=False, enable_checkpointing=False)
    assert type(trainer.strategy).__name__ == "ModelParallelStrategy"
    assert (trainer.num_nodes, trainer.num_devices, trainer.accumulate_grad_batches) == (2, 8, 3)
    assert trainer.precision == "32-true"


@pytest.mark.parametrize("plan", [PLAN, HYBRID, replace(PLAN, recompute=("blocks.1",))])
def test_lightnings_file_shards_the_plans_units_and_recomputes_the_plans_blocks(plan, tmp_path):
    pytest.importorskip("lightning")
    module = runpy.run_path(str(written(replace(plan, device="cpu"), tmp_path) / "lightning_fsdp2.py"))
    model = Net()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.gpus)
    try:
        module["shard"](model)
        sharded = {name for name, m in model.named_modules() if isinstance(m, FSDPModule)}
        shards = model.blocks[0].linear.weight
        assert sharded == set(UNITS)
        assert shards.device_mesh.ndim == 1 + (plan is HYBRID)
        from torch.distributed._composable import checkpoint

        recomputed = {n for n, m in model.named_modules() if n and getattr(checkpoint.state(m), "enable_hook", False)}
        assert recomputed == set(plan.recompute)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("plan", [OFFLOADED, replace(OFFLOADED, gpus=16, nodes=2, shard_gpus=8)])
def test_lightning_takes_an_offloaded_plan_for_the_first_fsdp(plan, tmp_path):
    pytest.importorskip("lightning")
    text = (written(plan, tmp_path) / "lightning_fsdp2.py").read_text()
    model, module = Net(), runpy.run_path(str(tmp_path / "lightning_fsdp2.py"))
    strategy = module["strategy"](model)
    assert strategy.cpu_offload.offload_params
    assert strategy.sharding_strategy.name == ("HYBRID_SHARD" if plan.nodes > 1 else "FULL_SHARD")
    wraps = strategy.kwargs["auto_wrap_policy"]
    assert [n for n, m in model.named_modules() if wraps(m, False, 0)] == list(UNITS[1:])
    assert "This is the first FSDP" in text


def test_lightning_takes_the_plan_for_deepspeed(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    pytest.importorskip("deepspeed")
    module = runpy.run_path(str(written(DEEPSPEED, tmp_path) / "lightning_deepspeed.py"))
    strategy = module["strategy"]()
    assert strategy.config["train_micro_batch_size_per_gpu"] == 2
    assert strategy.zero_stage_3
    assert "gradient_accumulation_steps" not in strategy.config


@pytest.mark.parametrize("plan", [PLAN, OFFLOADED, HYBRID, replace(PLAN, recompute=(), loss_chunks=4, zero_stage=2)])
def test_torchtitan_takes_the_plan(plan, tmp_path):
    """Needs torchtitan and triton: ``pip install torchtitan==0.3.0 triton`` into an environment of its own."""
    pytest.importorskip("torchtitan")
    written(plan, tmp_path)
    code = (
        "from torchtitan.config import ConfigManager; import json\n"
        "c = ConfigManager().parse_args(['--module', 'torchtitan_config', '--config', 'planned'])\n"
        "t, p = c.training, c.parallelism\n"
        "print(json.dumps([t.local_batch_size, t.global_batch_size, t.enable_cpu_offload, t.mixed_precision_param,\n"
        "  p.data_parallel_replicate_degree, p.data_parallel_shard_degree, p.fsdp_reshard_after_forward,\n"
        "  type(c.activation_checkpoint).__qualname__, getattr(c.loss, 'num_chunks', 1)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == [
        2, 2 * 3 * plan.gpus, plan is OFFLOADED, "bfloat16",
        plan.nodes, 8, "never" if plan.zero_stage == 2 else "always",
        "FullAC.Config" if plan.recompute else "NoneType", plan.loss_chunks,
    ]  # fmt: skip


def torchrun_arguments(plan: Plan, folder: Path, **environment: str):
    """What torchrun reads of the line that the shell makes, and the threads it is given."""
    written(plan, folder)
    fake = folder / "torchrun"
    fake.write_text('#!/bin/sh\necho "${OMP_NUM_THREADS:-}"\nprintf "%s\\n" "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MASTER_ADDR")}
    run = subprocess.run(
        ["sh", "launch.sh", "--steps", "5"], cwd=folder, env={**clean, "PATH": path, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    threads, *arguments = run.stdout.splitlines()
    return get_args_parser().parse_args(arguments), threads


def test_torchrun_starts_the_ranks_of_one_node(tmp_path):
    found, threads = torchrun_arguments(PLAN, tmp_path)
    assert (found.standalone, found.nproc_per_node, found.training_script) == (True, "8", "train.py")
    assert found.training_script_args == ["--steps", "5"]
    assert threads == ""


def test_torchrun_meets_the_other_nodes_where_the_first_one_is(tmp_path):
    found, _ = torchrun_arguments(HYBRID, tmp_path, MASTER_ADDR="first")
    assert (found.nnodes, found.nproc_per_node, found.standalone) == ("2", "8", False)
    assert (found.rdzv_backend, found.rdzv_endpoint) == ("c10d", "first:29500")


def test_without_the_first_nodes_name_several_nodes_do_not_start(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as stopped:
        torchrun_arguments(HYBRID, tmp_path)
    assert "MASTER_ADDR" in stopped.value.stderr


def test_ranks_that_update_on_the_cpu_share_its_cores(tmp_path):
    _, threads = torchrun_arguments(replace(OFFLOADED, gpus=2), tmp_path)
    cores = int(subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout)
    assert int(threads) == max(1, cores // 2)


def test_memplans_own_plans_are_trained_by_memplan(tmp_path):
    found, _ = torchrun_arguments(replace(PLAN, target=Target.MEMPLAN), tmp_path)
    assert found.module
    assert [found.training_script, *found.training_script_args] == [
        "memplan", "train", "model.py", "--plan", "plan.json", "--steps", "5",
    ]  # fmt: skip


FOR_DEEPSPEED = {"ds_config.json", "accelerate-deepspeed.yaml", "huggingface-deepspeed.json", "lightning_deepspeed.py"}
FOR_FSDP2 = {"accelerate-fsdp2.yaml", "huggingface-fsdp2.json", "lightning_fsdp2.py", "torchtitan_config.py"}


@given(plans())
@settings(deadline=None)
def test_any_valid_plan_becomes_the_files_of_its_engine_and_all_can_be_read(plan):
    files = configurations(plan)
    wanted = {Target.DEEPSPEED: FOR_DEEPSPEED, Target.FSDP2: FOR_FSDP2, Target.MEMPLAN: FOR_DEEPSPEED | FOR_FSDP2}
    assert set(files) == wanted[plan.target] | {"launch.sh", NOTES}
    for name, text in files.items():
        assert text.endswith("\n")
        if name.endswith(".json"):
            assert isinstance(json.loads(text), dict)
        elif name.endswith(".yaml"):
            assert isinstance(yaml.safe_load(text), dict)
        elif name.endswith(".py"):
            compile(text, name, "exec")


@given(plans())
@settings(deadline=None)
def test_the_batch_of_a_step_is_the_same_in_all_files(plan):
    files = configurations(replace(plan, target=Target.MEMPLAN))
    whole = plan.micro_batch_size * plan.gradient_accumulation_steps * plan.gpus
    assert json.loads(files["ds_config.json"])["train_batch_size"] == whole
    for name in ("huggingface-deepspeed.json", "huggingface-fsdp2.json"):
        found = json.loads(files[name])
        assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] * plan.gpus == whole
    for name in ("accelerate-deepspeed.yaml", "accelerate-fsdp2.yaml"):
        assert yaml.safe_load(files[name])["num_processes"] == plan.gpus
    for name in ("lightning_deepspeed.py", "lightning_fsdp2.py"):
        assert re.search(f'"accumulate_grad_batches": {plan.gradient_accumulation_steps}\\b', files[name])
        assert f"give your data loader {plan.micro_batch_size} samples" in files[name]
    assert f"global_batch_size = {whole}\n" in files["torchtitan_config.py"]
    ranks = plan.gpus // plan.nodes
    assert f"--nproc-per-node {ranks} " in files["launch.sh"]


@given(plans())
@settings(deadline=None, max_examples=30)
def test_accelerates_own_configuration_class_knows_every_key(plan):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    with TemporaryDirectory() as folder:
        for file in written(replace(plan, target=Target.MEMPLAN), Path(folder)).glob("*.yaml"):
            assert config_args.load_config_from_file(str(file)).num_processes == plan.gpus


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"placements": tuple(Placement(u, *(AWAY if u else RESIDENT)) for u in UNITS)}, "all of them or none"),
        ({"placements": tuple(Placement(u, Tier.GPU, H, H) for u in UNITS)}, "keeps weights on the GPU"),
        ({"placements": tuple(Placement(u, H, H, Tier.NVME) for u in UNITS), "nvme_dir": "/swap"}, "NVMe"),
        ({"loss_chunks": 4}, "in 4 chunks"),
        ({"recompute": ("blocks.1",)}, "all blocks or none"),
        ({"checkpoints": H}, "here they stay on the GPU"),
        ({"precision": Precision.BF16}, "fp32 shards"),
        ({"zero_stage": 1}, "ZeRO stage 1"),
        ({"placements": OFFLOADED.placements, "gpu_update_share": 0.5}, "the GPU takes no share"),
        ({"gpus": 16, "nodes": 2, "shard_gpus": 8}, "2 copies over 8 GPUs"),
    ],
)
def test_what_fsdp2_can_not_express_is_said_beside_its_files(changes, said):
    notes = " ".join(configurations(replace(PLAN, **changes))[NOTES].split())
    assert said in notes


def test_the_classes_of_blocks_come_from_the_profile():
    types = {"": "Net", "blocks.0": "Dense", "blocks.1": "Sparse", "blocks.2": "Dense", "embed": "Linear"}
    layers = [SimpleNamespace(path=path, type=name) for path, name in types.items()]
    profile = SimpleNamespace(layers=layers, blocks=PLAN.recompute)
    assert block_classes_of(profile) == ("Dense", "Sparse")


@pytest.mark.parametrize("optimizer", OptimizerKind)
def test_files_that_train_with_another_optimizer_than_the_plan_say_so(optimizer):
    notes = configurations(replace(PLAN, target=Target.MEMPLAN, optimizer=optimizer))[NOTES]
    other = optimizer not in (OptimizerKind.ADAMW, OptimizerKind.ADAM)
    assert (f"the plan is for {optimizer}, and these files train with AdamW" in notes) == other
