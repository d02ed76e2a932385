from profiler.events import BACKWARD, Alloc, Category, Free, Gradient
from profiler.gradients_taken import gradients_taken


def gradient(number: int, size: int) -> Alloc:
    return Alloc(number, size, Category.GRADIENT, "layer", BACKWARD)


def test_a_gradient_ends_when_it_arrives_and_is_told_by_its_size():
    events = [gradient(1, 100), gradient(2, 50), Gradient("bias"), Gradient("weight")]
    found = gradients_taken(events, {"weight": 100, "bias": 50})
    assert found[2:] == [Gradient("bias"), Free(2, BACKWARD), Gradient("weight"), Free(1, BACKWARD)]


def test_of_gradients_of_one_size_each_ends_once():
    events = [gradient(1, 100), gradient(2, 100), Gradient("a"), Gradient("b"), Gradient("a")]
    found = gradients_taken(events, {"a": 100, "b": 100})
    assert [e.id for e in found if isinstance(e, Free)] == [1, 2]


def test_other_storages_stay():
    activation = Alloc(1, 100, Category.ACTIVATION, "layer", BACKWARD)
    assert gradients_taken([activation, Gradient("a")], {"a": 100}) == [activation, Gradient("a")]
