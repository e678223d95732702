"""The compiled part of the package; all else is in pyproject.toml.

A plain shared library, opened by ctypes. Where it cannot be built, `ecliptic.ops.softmax` does the same in torch.
"""

from setuptools import Extension, setup

NATIVE = "src/ecliptic/ops/native/"

setup(
    ext_modules=[
        Extension(
            "ecliptic.ops.native._softmax",
            sources=[NATIVE + "softmax.cpp"],
            depends=[NATIVE + "softmax_rows.inc", NATIVE + "softmax_vectors.h"],
            language="c++",
            # The two warnings are about GCC's own intrinsics.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fno-math-errno",
                "-fopenmp",
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
