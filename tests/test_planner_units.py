from memplan.units import owner, unit_paths, units_of
from offload.residency import aligned
from tests.synthetic_profiles import layer, parameter, profile_of, transformer


def names(profile):
    return [u.name for u in units_of(profile)]


def test_blocks_and_large_modules_are_units_in_forward_order_after_the_root():
    assert names(transformer(3)) == ["", "embed", "layers.0", "layers.1", "layers.2", "head"]


def test_every_parameter_belongs_to_exactly_one_unit():
    profile = transformer(3, block_elements=1000, embedding=500, root=7)
    assert sum(u.trainable_elements for u in units_of(profile)) == sum(
        aligned(p.elements, 64) for p in profile.parameters
    )


def test_tied_weights_of_two_modules_belong_to_the_root():
    tied = parameter("embed.weight", 500, aliases=["head.weight"])
    profile = profile_of(
        [tied, parameter("h.0.w", 100), parameter("h.1.w", 100)],
        [
            *(layer("", 0, 700), layer("embed", 1, 500), layer("h", None), layer("h.0", 2, 100)),
            *(layer("h.1", 3, 100), layer("head", 4, 500)),
        ],
        ["h.0", "h.1"],
    )
    assert names(profile) == ["", "h.0", "h.1"]
    assert units_of(profile)[0].trainable_elements == aligned(500, 64)


def test_weights_tied_inside_one_unit_stay_there():
    profile = profile_of(
        [parameter("h.0.a", 100, aliases=["h.0.b"]), parameter("h.1.a", 100)],
        [layer("", 0, 200), layer("h", None), layer("h.0", 1, 100), layer("h.1", 2, 100)],
        ["h.0", "h.1"],
    )
    assert names(profile) == ["h.0", "h.1"]


def test_a_module_whose_weight_is_used_outside_it_joins_the_root():
    profile = profile_of(
        [parameter("embed.weight", 500, outside=True), parameter("h.0.w", 100), parameter("h.1.w", 100)],
        [layer("", 0, 700), layer("embed", 1, 500), layer("h", None), layer("h.0", 2, 100), layer("h.1", 3, 100)],
        ["h.0", "h.1"],
    )
    assert names(profile) == ["", "h.0", "h.1"]


def test_without_blocks_the_children_of_the_model_are_units():
    profile = profile_of(
        [parameter("a.0.w", 1000), parameter("b.w", 1000), parameter("c.w", 3)],
        [layer("", 0, 2003), layer("a", 1, 1000), layer("a.0", 2, 1000), layer("b", 3, 1000), layer("c", 4, 3)],
        [],
    )
    assert names(profile) == ["", "a", "b"]


def test_of_a_list_that_nobody_calls_the_large_members_are_units():
    profile = profile_of(
        [parameter("s.0.down.0.w", 3), parameter("s.0.down.1.w", 500), parameter("s.0.h.0.w", 900)],
        [
            *(layer("", 0, 1403), layer("s", None, 1403), layer("s.0", 1, 1403), layer("s.0.down", None, 503)),
            *(layer("s.0.down.0", 2, 3), layer("s.0.down.1", 3, 500), layer("s.0.h", None, 900)),
            *(layer("s.0.h.0", 4, 900), layer("s.0.h.0.inner", None, 900), layer("s.0.h.0.inner.0", 5, 900)),
        ],
        ["s.0.h.0"],
    )
    assert names(profile) == ["", "s.0.down.1", "s.0.h.0"], "what is inside of a block stays there"


def test_a_module_of_which_nothing_is_ever_called_is_one_unit():
    profile = profile_of(
        [parameter("a.w", 1000), parameter("b.0.w", 1000)],
        [layer("", 0, 2000), layer("a", 1, 1000), layer("b", None, 1000), layer("b.0", None, 1000)],
        [],
    )
    assert names(profile) == ["a", "b"]


def test_frozen_parameters_are_counted_apart():
    profile = profile_of(
        [parameter("h.0.w", 64), parameter("h.0.f", 128, trainable=False)],
        [layer("", 0, 192), layer("h", None), layer("h.0", 1, 192)],
        ["h.0"],
    )
    (unit,) = units_of(profile)
    assert (unit.trainable_elements, unit.frozen_elements) == (64, 128)


def test_no_unit_lies_inside_another():
    paths = unit_paths(transformer(12))
    assert not any(a != b and b.startswith(a + ".") for a in paths for b in paths)


def test_a_path_owns_only_what_lies_under_it():
    assert owner(["layers.1.w"], ["layers.1", "layers.10"]) == "layers.1"
    assert owner(["layers.10.w"], ["layers.1", "layers.10"]) == "layers.10"
    assert owner(["layers.1.w", "layers.10.w"], ["layers.1", "layers.10"]) == ""
