"""torchrun: the line that starts the ranks, as a shell file."""

from memplan.configs.comments import commented
from offload.plan import Plan, Target, Tier

PORT = 29500
SETTINGS, EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
"""How PyTorch's allocator is told to let segments grow; newer versions have a second name for the variable."""


def launch_script(plan: Plan) -> str:
    """``launch.sh``: memplan's own training for its own plans, your script for the other engines."""
    ranks = plan.gpus // plan.nodes
    script = "-m memplan train model.py --plan plan.json" if plan.target is Target.MEMPLAN else "train.py"
    notes = ["Starts the ranks of one node; what follows the file's name goes to the script."]
    if plan.nodes > 1:
        notes.append("Run it on every node, with MASTER_ADDR set to the name of the first one.")
        where = f'--nnodes {plan.nodes} --rdzv-backend c10d --rdzv-endpoint "${{MASTER_ADDR:?}}:{PORT}"'
    else:
        where = "--standalone"
    lines = ["#!/bin/sh\n" + commented(notes) + "set -eu"]
    if ranks > 1 and (plan.uses(Tier.HOST) or plan.uses(Tier.NVME)):
        lines.append("# The CPU updates offloaded state; by itself torchrun gives each rank one thread.")
        lines.append("cores=$(nproc)")
        lines.append(f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$((cores > {ranks} ? cores / {ranks} : 1))}}"')
    if plan.target is not Target.MEMPLAN:  # whose engine does it by itself
        lines.append("# Plans count on memory without gaps: pieces of fixed segments can be left over that fit nobody.")
        lines.append(f'[ -n "${{PYTORCH_ALLOC_CONF:-}}" ] || export {SETTINGS}="${{{SETTINGS}:-{EXPANDABLE}}}"')
    lines.append(f'exec torchrun {where} --nproc-per-node {ranks} {script} "$@"')
    return "\n".join(lines) + "\n"
