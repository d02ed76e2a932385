"""Which parameters move together: the units of a profile, in the order in which the forward pass uses them."""

from collections import defaultdict
from collections.abc import Iterable, Set

from offload.residency import UnitShape
from profiler.profile import ModelProfile, ParameterProfile

OWN_UNIT_SHARE = 0.01
"""A module beside the blocks is a unit of its own from this share of all parameters; smaller ones join the root."""


def owner(names: Iterable[str], paths: Iterable[str]) -> str:
    """The unit that owns a parameter with these dotted names: the one path that all of them lie in, or the root "".

    Of paths inside each other it is the innermost. Who asks often gives a set.
    """
    known = paths if isinstance(paths, Set) else frozenset(paths)
    owners = {_innermost(name.rpartition(".")[0], known) for name in names}
    return owners.pop() if len(owners) == 1 else ""


def _innermost(path: str, known: Set[str]) -> str:
    while path and path not in known:
        path = path.rpartition(".")[0]
    return path


def unit_paths(profile: ModelProfile) -> tuple[str, ...]:
    """Paths of all units but the root, in forward order; none lies inside another.

    Every block is one, and so is every outermost module without blocks inside that holds at least
    ``OWN_UNIT_SHARE`` of the parameters (an embedding, a head). One that is never called, a list of others, can not
    tell when its weights are needed: those in it can.
    """
    blocks = set(profile.blocks)
    # The modules around the blocks; the model itself is always one of them.
    around = {""} | {b[:i] for b in blocks for i, letter in enumerate(b) if letter == "."}
    called = [layer.path for layer in profile.layers if layer.calls]
    for layer in profile.layers:  # a module comes before those in it
        lists = not layer.calls and any(path.startswith(layer.path + ".") for path in called)
        if lists and layer.path.rpartition(".")[0] in around and layer.path not in blocks:
            around.add(layer.path)
    beside = {
        layer.path
        for layer in profile.layers
        if layer.path not in around | blocks
        and layer.path.rpartition(".")[0] in around
        and layer.parameters >= OWN_UNIT_SHARE * profile.parameter_elements
    }
    order = {layer.path: layer.order for layer in profile.layers}
    listed = {layer.path: i for i, layer in enumerate(profile.layers)}

    def position(path: str) -> tuple[float, int]:
        first = order.get(path)
        return (float("inf") if first is None else first, listed.get(path, len(listed)))

    return tuple(sorted(blocks | beside, key=position))


def units_of(profile: ModelProfile) -> tuple[UnitShape, ...]:
    """The units in forward order, the root unit "" first if it owns parameters; units without parameters are left out.

    The root owns what lies in no unit and what several units share. A module with a parameter that is used outside its
    forward is no unit at all: whoever reads the plan can then tell owners from the paths alone.
    """
    paths = unit_paths(profile)
    inside = frozenset(paths)
    outside = {owner([name], inside) for p in profile.parameters if p.used_outside for name in (p.name, *p.aliases)}
    paths = tuple(path for path in paths if path not in outside)
    inside = frozenset(paths)
    members: dict[str, list[ParameterProfile]] = defaultdict(list)
    for parameter in profile.parameters:
        members[owner((parameter.name, *parameter.aliases), inside)].append(parameter)
    return tuple(
        UnitShape.of(
            path,
            [p.elements for p in members[path] if p.trainable],
            [p.elements for p in members[path] if not p.trainable],
        )
        for path in ("", *paths)
        if path in members
    )
