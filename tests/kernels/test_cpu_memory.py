"""Memory of large tensors that is used again."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
from contextlib import nullcontext

import pytest
import torch

from actvar import accelerate, load_pretrained, release_cache
from actvar_kernels.cpu_backend import memory
from actvar_kernels.cpu_backend.memory import HUGE_PAGE, empty, empty_for_long, release, reused_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
MIB = 2**20


@pytest.fixture(autouse=True)
def _nothing_kept():
    release()
    yield
    release()


def bytes_kept() -> int:
    return sum(map(len, memory._free))


def test_what_a_tensor_and_its_views_leave_is_taken_by_the_next_one_of_about_its_size():
    with reused_memory():
        first = empty((4, MIB), torch.float32)
        place, view = first.data_ptr(), first[1:].transpose(0, 1)
        del first
        others = [empty((4, MIB), torch.float32)]  # a view still has the first one's
        del view
        others.append(empty((9, MIB), torch.bfloat16))  # for which it is too small
        others.append(empty((1, MIB), torch.float32))  # and much too large
        assert place not in {other.data_ptr() for other in others}
        assert empty((3, MIB), torch.float32).data_ptr() == place


@pytest.mark.parametrize("shape", [(3,), (HUGE_PAGE,), (3, HUGE_PAGE + 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_tensors_have_their_shape_and_type_and_hold_what_is_written(shape, dtype):
    tensors = [empty(shape, dtype).fill_(value) for value in (1, 2)]
    for value, tensor in zip((1, 2), tensors, strict=True):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert (tensor == value).all()
        assert tensor.is_contiguous()


@pytest.mark.parametrize("size", [5, 3 * MIB])
def test_a_copy_for_long_takes_no_memory_that_is_to_be_used_again(size):
    with reused_memory():
        place = empty((3 * MIB,), torch.float32).data_ptr()
        source = torch.arange(2 * size, dtype=torch.float32)[::2]
        copy = empty_for_long(tuple(source.shape), source.dtype).copy_(source)
        assert copy.data_ptr() != place
        assert torch.equal(copy, source)
        assert copy.is_contiguous()
        del copy
        assert bytes_kept() == 12 * MIB


def test_outside_a_limit_stays_and_inside_all_does(monkeypatch):
    place = empty((MIB,), torch.float32).data_ptr()
    assert bytes_kept() == 4 * MIB
    assert empty((MIB,), torch.float32).data_ptr() == place
    release()
    monkeypatch.setattr(memory, "KEPT", 20 * MIB)
    tensors = [empty((2 * MIB,), torch.float32) for _ in range(4)]
    tensors.clear()
    assert bytes_kept() == 16 * MIB
    release()
    with reused_memory():
        tensors = [empty((2 * MIB,), torch.float32) for _ in range(4)]
        escaped = tensors.pop()
        tensors.clear()
        assert bytes_kept() == 24 * MIB
    assert bytes_kept() == 16 * MIB
    del escaped  # over the limit
    assert bytes_kept() == 16 * MIB
    release()
    assert bytes_kept() == 0


def test_an_exception_ends_the_context_and_threads_do_not_share_a_tensor(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 0)
    with pytest.raises(KeyError), reused_memory():
        raise KeyError
    empty((MIB,), torch.float32)
    assert bytes_kept() == 0
    wrong = []

    def work(value: int) -> None:
        with reused_memory():
            for _ in range(200):
                tensor = empty((MIB,), torch.float32)
                tensor[:1000] = value
                if not (tensor[:1000] == value).all():
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_image_keeps_its_values_when_the_next_one_is_decoded_and_the_memory_is_given_back():
    vae, var = load_pretrained("fashion-mnist")
    accelerate(var)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(64, vae.Cvae, 8, 8, generator=generator) for _ in range(2)]
    with torch.no_grad():
        first = vae.fhat_to_img(features[0])
        before = first.clone()
        vae.fhat_to_img(features[1])
    assert torch.equal(first, before)
    del first
    gc.collect()
    assert 0 < bytes_kept() <= memory.KEPT
    release_cache(var)
    assert bytes_kept() == 0


class Limited(mmap.mmap):
    """Memory of a system that grants it only `grants` times, and answers advice with an error."""

    grants = 0

    def __new__(cls, *arguments):
        if cls.grants == 0:
            raise OSError(12, "Cannot allocate memory")
        cls.grants -= 1
        return super().__new__(cls, *arguments)

    def madvise(self, *_):
        raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("grants", [0, 1, 2])
@pytest.mark.parametrize("advice", ["refused", "unknown to Python", "without a function"])
@pytest.mark.parametrize("reuses", [False, True])
def test_where_the_system_has_no_huge_pages_or_no_such_memory_tensors_are_made_all_the_same(
    grants, advice, reuses, monkeypatch
):
    monkeypatch.setattr(Limited, "grants", grants)
    if advice == "unknown to Python":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    elif advice == "without a function":
        monkeypatch.delattr(Limited, "madvise")
    monkeypatch.setattr(mmap, "mmap", Limited)
    with reused_memory() if reuses else nullcontext():
        first = empty((3, MIB), torch.float32).fill_(1)
        second = empty_for_long((MIB,), torch.float32).fill_(2)
        third = empty((MIB,), torch.bfloat16).fill_(3)
    for value, tensor in zip((1, 2, 3), (first, second, third), strict=True):
        assert (tensor == value).all()
        assert tensor.is_contiguous()


def test_memory_that_no_tensor_has_is_given_back_where_the_system_grants_no_more(monkeypatch):
    with reused_memory():
        empty((MIB,), torch.float32)
        assert bytes_kept() == 4 * MIB
        granted = mmap.mmap

        def grant(*arguments):
            if bytes_kept():
                raise OSError(12, "Cannot allocate memory")
            return granted(*arguments)

        monkeypatch.setattr(mmap, "mmap", grant)
        tensor = empty((8, MIB), torch.float32)
        del tensor
        assert bytes_kept() == 32 * MIB  # it was made in such memory


@pytest.mark.parametrize("shape", [(2**60,), (2**48,), (2**62 - 1,)])
def test_more_than_any_system_has_is_torchs_own_error(shape):
    with pytest.raises(RuntimeError, match="allocate memory"):
        empty(shape, torch.uint8)
