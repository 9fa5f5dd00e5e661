"""Build the compiled modules: the runtime once, and every kernel source once per tier.

A tier is an instruction-set level. The same ``src/*.pyx`` becomes
``bncore._kernels.<tier>.<module>`` for each, with its C++ in ``build/<tier>``, and the best one the
CPU can run is chosen at import. Metadata are in pyproject.toml.

Environment variables read here:

BNCORE_TIERS
    Comma-separated tiers to build, instead of all of the machine's architecture.
BNCORE_REQUIRE_OPENMP
    ``1``: fail where the compiler has no OpenMP, instead of building serial kernels.
"""

import hashlib
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import Cython
import numpy as np
from Cython.Build import cythonize
from extension_helpers import add_openmp_flags_if_available
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

TIERS = {
    "x86-64-v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "x86-64-v3": ["-march=x86-64-v3"],
    "x86-64-v2": ["-march=x86-64-v2"],
    "generic": [],
}
COMPILE_FLAGS = [
    "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off",  # src/simd.h says itself what is fused
]  # fmt: skip
SUFFIXES = {"c": ".c", "c++": ".cpp"}
COMPILER_VARIABLES = ["CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"]
MACROS = [
    ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
    ("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION"),
]


def tiers() -> list[str]:
    """The tiers to build: BNCORE_TIERS, or all of the target architecture."""
    chosen = os.environ.get("BNCORE_TIERS")
    if chosen:
        names = [name.strip() for name in chosen.split(",")]
        unknown = set(names) - TIERS.keys()
        if unknown:
            raise OptionError(
                f"BNCORE_TIERS names {', '.join(sorted(unknown))}; there are {', '.join(TIERS)}"
            )
        return names
    if sysconfig.get_platform().endswith(("x86_64", "amd64")):
        return [name for name in TIERS if name.startswith("x86-64")]
    return ["generic"]


def extensions() -> list[Extension]:
    """The runtime, and each kernel source in each tier."""
    runtime, kernels = Path("src/runtime.pyx"), sorted(Path("src").glob("*.pyx"))
    kernels.remove(runtime)
    built = [extension("bncore._runtime", runtime, tier=None, language="c", flags=["-pthread"])]
    for tier in tiers():
        package = f"bncore._kernels.{tier.replace('-', '_')}"
        for source in kernels:
            name = f"{package}.{source.stem}"
            flags = ["-std=c++17", *TIERS[tier]]
            built.append(extension(name, source, tier=tier, language="c++", flags=flags))
    return built


def extension(name, source, *, tier, language, flags) -> Extension:
    """One compiled module; ``tier`` is None where none is meant."""
    module = Extension(
        name,
        [str(source)],
        include_dirs=["src", np.get_include()],
        define_macros=MACROS,
        extra_compile_args=[*COMPILE_FLAGS, *flags],
        language=language,
        depends=["setup.py", *sorted(map(str, Path("src").glob("*.h")))],
    )
    module.tier = tier
    return module


class BuildTiers(build_ext):
    """Translate each tier's modules into a directory of its own, then compile them in parallel."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        self.add_openmp()
        self.drop_unsupported_tiers()
        for module in self.extensions:
            module.sources = [self.translate(module)]
        super().build_extensions()

    def translate(self, module) -> str:
        """Translate a module to C or C++, whose time changes only with what it is made from.

        Cython goes by times, of NumPy's declarations too, and pip installs these anew for each
        build: what has not changed would be compiled again.
        """
        directory = Path("build", module.tier or "runtime")
        source = Path(module.sources[0])
        text = directory / source.with_suffix(SUFFIXES[module.language])
        stamp = directory / f"{module.name}.made-from"
        made_from = fingerprint(module)
        is_same = text.exists() and stamp.exists() and stamp.read_text() == made_from
        written = text.stat().st_mtime_ns if is_same else None
        stamp.unlink(missing_ok=True)
        cythonize(
            [module],
            build_dir=str(directory),
            include_path=["src"],
            force=self.force or not is_same,
            compiler_directives={"language_level": "3", "freethreading_compatible": True},
        )
        if written is not None:
            os.utime(text, ns=(written, written))
        stamp.write_text(made_from)
        return str(text)

    def copy_extensions_to_source(self):
        for module in self.extensions:
            Path(*module.name.split(".")[:-1]).mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def add_openmp(self):
        """Compile and link with OpenMP, or say loudly that the kernels will be serial."""
        probe = Extension("probe", [])
        if add_openmp_flags_if_available(probe):
            for module in self.extensions:
                module.extra_compile_args += probe.extra_compile_args
                module.extra_link_args += probe.extra_link_args
        elif os.environ.get("BNCORE_REQUIRE_OPENMP") == "1":
            raise CompileError("BNCORE_REQUIRE_OPENMP=1, but the compiler has no OpenMP")
        else:
            shout("the compiler has no OpenMP: bncore will run on ONE THREAD")

    def drop_unsupported_tiers(self):
        """Leave out the tiers whose flags the compiler does not know."""
        dropped = {
            tier
            for tier in {module.tier for module in self.extensions} - {None}
            if not self.accepts(TIERS[tier])
        }
        for tier in sorted(dropped):
            shout(f"the compiler does not know {' '.join(TIERS[tier])}: no tier {tier}")
        self.extensions[:] = [module for module in self.extensions if module.tier not in dropped]

    def accepts(self, flags) -> bool:
        """Whether the compiler takes these flags."""
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory, "empty.cpp")
            source.write_text("int main() { return 0; }\n")
            try:
                self.compiler.compile([str(source)], output_dir=directory, extra_postargs=flags)
            except CompileError:
                return False
        return True


def fingerprint(module: Extension) -> str:
    """What a module is made from, its source and the declarations, and how it is compiled."""
    parts = [Path(module.sources[0]), *sorted(Path("src").glob("*.pxd"))]
    how = [
        Cython.__version__, np.__version__, sys.version,
        *module.extra_compile_args, *module.extra_link_args,
        *(f"{name}={os.environ.get(name)}" for name in COMPILER_VARIABLES),
    ]  # fmt: skip
    made_from = b"".join(part.read_bytes() for part in parts) + "\n".join(how).encode()
    return hashlib.sha256(made_from).hexdigest()


def shout(message: str) -> None:
    """A warning that a long build log does not hide."""
    line = "*" * 80
    print(f"\n{line}\n** WARNING: {message}\n{line}\n", file=sys.stderr)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildTiers})
