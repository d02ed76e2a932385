"""What to do about the errors that PyTorch and compiled extensions raise when they meet tensors without memory."""

import re

import torch
from torch._subclasses.fake_tensor import UnsupportedOperatorException

COMPILED_PACKAGES = frozenset(
    ("apex", "bitsandbytes", "causal_conv1d", "flash_attn", "mamba_ssm", "transformer_engine", "triton", "xformers")
)
"""Packages that need a compiler or a CUDA device."""

KERNEL_LINES = """\
    @torch.library.register_fake("{name}")
    def _({arguments}): return torch.empty_like({first})"""

HINTS = (
    (
        r"data pointer|storage data|doesn't have storage|0 active drivers|must be a CUDA tensor|expected a cuda tensor",
        "a compiled extension or a Triton kernel asks for the memory of a tensor, and a profile has shapes only: make "
        "it a torch.library.custom_op with a register_fake, or let forward take plain PyTorch where "
        "torch.cuda.is_available() is false",
    ),
    (
        r"CUDA_HOME|Error building extension|Ninja is required|not compiled with CUDA|No CUDA GPUs|no NVIDIA driver",
        "it needs CUDA, or a compiler, which this machine has not: let the file take plain PyTorch where "
        "torch.cuda.is_available() is false, with the same shapes",
    ),
    (
        r"_apply\(\): Couldn't swap",
        "forward moves or casts a whole module; do that in build_model()",
    ),
    (
        r"FlexAttention does not support backward on CPU",
        "use scaled_dot_product_attention with is_causal or a mask for the profile",
    ),
)
"""(what the message has, what to do)"""


def hint(error: BaseException) -> str | None:
    """What to do about an error, or None if it says all there is."""
    text = str(error)
    if (operation := _without_kernel(error, text)) is not None:
        return _kernel_hint(operation)
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in COMPILED_PACKAGES:
        return (
            "it is a compiled package; install it, or let the file take plain PyTorch, with the same shapes, where the "
            "import fails"
        )
    if isinstance(error, ModuleNotFoundError):
        return (
            "install it; if it is a compiled extension that needs a GPU, let the file take plain PyTorch, with the "
            "same shapes, where the import fails"
        )
    return next((advice for pattern, advice in HINTS if re.search(pattern, text, re.IGNORECASE)), None)


def _without_kernel(error: BaseException, text: str) -> str | None:
    """The qualified name of an operation that has no fake kernel."""
    if isinstance(error, UnsupportedOperatorException):
        return str(error.func._schema.name)
    found = re.search(r"no fake impl registered for <CustomOpDef\(([\w:]+)\)>", text) or re.search(
        r"([\w]+::[\w.]+): attempted to run this operator with Meta tensors", text
    )
    return found[1] if found else None


def _kernel_hint(name: str) -> str:
    if name.startswith("aten::_nested"):
        return "nested tensors can not be traced; give the batch as padded tensors"
    if name.startswith("aten::"):
        return f"PyTorch does not tell the shape of what {name} returns; take another operation for the profile"
    namespace, _, operation = name.partition("::")
    operation = operation.partition(".")[0]
    schema = getattr(getattr(torch.ops, namespace), operation).default._schema
    arguments = [argument.name for argument in schema.arguments] or ["*args"]
    name = f"{namespace}::{operation}"
    lines = KERNEL_LINES.format(name=name, arguments=", ".join(arguments), first=arguments[0])
    return f"the operation {name} has no fake kernel, which tells the shape it returns; add one:\n{lines}"
