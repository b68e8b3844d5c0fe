"""The compiled kernels, one instruction set after the other."""

from collections.abc import Iterator

import pytest

from learned_optim.backends.native import library as native_library


@pytest.fixture(params=["plain", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every variant that this processor has."""
    library, wanted = native_library.LIBRARY, ("plain", "avx2", "avx512").index(request.param)
    library.learned_optim_limit_isa(wanted)  # type: ignore[union-attr]
    try:
        if library.learned_optim_isa() != wanted:  # type: ignore[union-attr]
            pytest.skip(f"this processor has no {request.param}")
        yield
    finally:
        library.learned_optim_limit_isa(2)  # type: ignore[union-attr]
