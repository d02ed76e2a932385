"""torchrun: the line that starts the ranks, as a shell file."""

from memplan.configs.comments import commented
from offload.plan import Plan, Target, Tier

PORT = 29500


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
    lines.append(f'exec torchrun {where} --nproc-per-node {ranks} {script} "$@"')
    return "\n".join(lines) + "\n"
