"""What the smaller sections need: checkpointed activations, compilation, parallelism, data, and the like."""

from collections.abc import Iterator

from memplan.lint.finding import Finding
from memplan.lint.view import View

ALIGNED = 8


def activation_checkpointing(view: View) -> Iterator[Finding]:
    """Options of ``deepspeed.checkpointing``, which a model has to call."""
    at = "activation_checkpointing"
    section = view.document.section(at)
    if view.value(f"{at}.contiguous_memory_optimization"):
        key = f"{at}.contiguous_memory_optimization"
        for other, words in (("partition_activations", "partition_activations: true"), ("number_checkpoints", "")):
            if not view.value(f"{at}.{other}"):
                suggestion = words or "number_checkpoints: the layers of the model"
                yield view.say("error", key, f"needs {other}; DeepSpeed stops when checkpointing is set up", suggestion)
    if any(value not in (False, None) for value in section.values()):
        yield view.say(
            "note",
            at,
            "recomputes nothing by itself: a model has to call deepspeed.checkpointing.checkpoint; Hugging Face's "
            "gradient_checkpointing does not look here",
        )


def compilation(view: View) -> Iterator[Finding]:
    """DeepCompile: one thing to offload at a time."""
    at = "compile"
    if not view.value(f"{at}.deepcompile"):
        return
    both = view.device("offload_param") == "cpu" and view.device("offload_optimizer") == "cpu"
    parameters = view.value(f"{at}.offload_parameters") or (both and view.stage == 3)
    states, activation = view.value(f"{at}.offload_opt_states"), view.value(f"{at}.offload_activation")
    stops = "DeepSpeed stops when it compiles"
    if view.stage == 0:
        yield view.say("warning", f"{at}.deepcompile", "works at ZeRO stages 1, 2 and 3; plain torch.compile is used")
    if view.stage != 3:
        return
    if states and view.device("offload_optimizer") != "none":
        yield view.say("error", f"{at}.offload_opt_states", f"does not go with offload_optimizer; {stops}")
    if activation and (parameters or states):
        yield view.say(
            "error", f"{at}.offload_activation", f"does not go with offloaded parameters or optimizer states; {stops}"
        )
    elif parameters and states:
        yield view.say("error", f"{at}.offload_opt_states", f"does not go with offloaded parameters; {stops}")


def parallelism(view: View) -> Iterator[Finding]:
    """How the GPUs are shared out."""
    gpus = view.facts.gpus
    split, inner = view.value("tensor_parallel.autotp_size"), view.value("tensor_parallel.tp.tp_size")
    if split and inner not in (1, split):
        yield view.say(
            "error",
            "tensor_parallel.tp.tp_size",
            f"is not autotp_size {split}; DeepSpeed stops at start",
            "leave it out",
        )
    for key in ("tensor_parallel.autotp_size", "sequence_parallel_size", "expert_parallel.autoep_size"):
        size = view.value(key)
        if gpus is not None and size > 1 and gpus % size:
            yield view.say(
                "error", key, f"{gpus} GPUs can not be split into groups of {size}; DeepSpeed stops at start"
            )
    data, sequence = view.value("data_parallel_size"), view.value("sequence_parallel_size")
    if gpus is not None and view.written("data_parallel_size") and data * sequence != gpus:
        yield view.say(
            "error",
            "data_parallel_size",
            f"{data} x sequence_parallel_size {sequence} is not {gpus} GPUs; DeepSpeed stops at start",
            str(gpus // sequence),
        )


def data_efficiency(view: View) -> Iterator[Finding]:
    """Curriculum learning and dynamic batches name what they need."""
    sampling = "data_efficiency.data_sampling"
    learning, batching = f"{sampling}.curriculum_learning", f"{sampling}.dynamic_batching"
    for key, needed in ((learning, "curriculum_metrics"), (batching, "max_tokens")):
        if view.value(f"{key}.enabled") and not view.written(f"{key}.{needed}"):
            yield view.say("error", f"{key}.enabled", f"needs {needed}; DeepSpeed stops at start", f"{key}.{needed}")
    for key in (learning, batching):
        outer = ("data_efficiency.enabled", f"{sampling}.enabled")
        off = [name for name in outer if not view.value(name)]
        if view.value(f"{key}.enabled") and off:
            yield view.say("warning", f"{key}.enabled", f"has no effect while {off[0]} is false", f"{off[0]}: true")


def the_rest(view: View) -> Iterator[Finding]:
    """Single keys, and the form of the file."""
    words = view.value("vocabulary_size")
    if words and words % ALIGNED:
        yield view.say("note", "vocabulary_size", f"{words} is no multiple of {ALIGNED}, which tensor cores like")
    if view.written("aio.use_gds") and view.value("aio.use_gds"):
        yield view.say(
            "note", "aio.use_gds", "needs CUDA and a file system with GPUDirect Storage; buffers are on the GPU"
        )
    if view.document.not_plain is not None:
        line, what = view.document.not_plain
        message = f"{what} is not JSON: DeepSpeed reads it, Hugging Face's Trainer and Accelerate stop"
        yield Finding("note", "", line, message, "plain JSON")
