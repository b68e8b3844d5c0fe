"""Build the optional CPU kernels. Everything else about the package stands in pyproject.toml."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

NATIVE = "learned_optim/backends/native"
SOURCES = sorted(Path(NATIVE).glob("*.[ch]"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
"""As native/library.py computes it, which loads no kernels that were built from other sources than lie beside it."""

UNROLL = ["-funroll-all-loops", "--param=max-completely-peeled-insns=2000", "--param=max-completely-peel-times=64"]
ATTEMPTS = ([*UNROLL, "-fopenmp"], ["-fopenmp"], [])
"""Compiler flags to try, best first: clang knows no --param, some compilers no OpenMP."""


class BuildOptional(build_ext):
    """Try to compile with less and less; the package works without the result, only slower."""

    def build_extension(self, ext: Extension) -> None:
        """Compile one extension with the first set of flags that works."""
        basic = ["-O3", "-g0", "-std=gnu11", "-ffp-contract=fast"]
        for number, flags in enumerate(ATTEMPTS, 1):
            ext.extra_compile_args = basic + flags
            ext.extra_link_args = [flag for flag in flags if flag == "-fopenmp"]
            try:
                return super().build_extension(ext)
            except (BaseError, OSError):
                if number == len(ATTEMPTS):
                    raise


setup(
    ext_modules=[
        Extension(
            "learned_optim.backends.native._native",
            sources=[str(path) for path in SOURCES if path.suffix == ".c"],
            depends=[str(path) for path in SOURCES],
            define_macros=[("SOURCE_DIGEST", f'"{DIGEST}"')],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildOptional},
)
