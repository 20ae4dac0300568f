"""Load machine code that numba compiled in an earlier process, without importing numba.

Importing numba and its cache of a large function takes about a second, more than a short generation saves. llvmlite alone loads the
same machine code in a twentieth of that time. It is saved next to the module's bytecode or, if that folder is read-only, in the
cache folder.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from tinylm.paths import atomic_file, cache_folder

if TYPE_CHECKING:
    import numpy as np

_ENTRY = "tinylm_entry"
"""The name of the function in an object file."""
_LOADED: list[Any] = []
"""LLVM's execution engines, which own the memory of the loaded code."""


@dataclass(frozen=True)
class NativeFunction:
    """A function that numba compiles once per machine, with the C signature `void function(void *record)`.

    `module` defines the Python function `name`, which takes a pointer to a record of type `record` and raises no exceptions.
    `sources` are the other modules that determine the machine code.
    """

    module: str
    name: str
    record: np.dtype[Any]
    sources: tuple[str, ...] = ()

    def is_compiled(self) -> bool:
        """Whether the machine code for this CPU is on disk."""
        return self._saved_file() is not None

    @cached_property
    def address(self) -> int:
        """The address of the function. Reading it compiles the function if necessary, which takes several seconds."""
        file = self._saved_file()
        code = self._compile_once() if file is None else file.read_bytes()
        binding = _llvm()
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target_machine())
        engine.add_object_file(binding.object_file.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _LOADED.append(engine)
        address: int = engine.get_function_address(_ENTRY)
        return address

    def compile(self) -> None:
        """Compile the function and save the machine code, unless it is on disk or another process is compiling it."""
        with suppress(Timeout):
            self._compile_once(timeout=0)

    def _compile_once(self, timeout: float = -1) -> bytes:
        """Return the machine code. If another process is compiling it, wait for up to `timeout` seconds (-1: no limit)."""
        folder = self._folders()[0]
        if not os.access(folder, os.W_OK):
            folder = self._folders()[1]
        file = folder / self._file_name
        with FileLock(file.with_suffix(".lock"), timeout=timeout):
            if (saved := self._saved_file()) is not None:
                return saved.read_bytes()
            code = self._compile()
            with atomic_file(file) as temporary:
                temporary.write_bytes(code)
            return code

    def _compile(self) -> bytes:
        from numba import cfunc, from_dtype, types

        function = getattr(import_module(self.module), self.name)
        compiled = cfunc(types.void(types.CPointer(from_dtype(self.record))), nopython=True)(function)
        return _object_code(compiled.inspect_llvm(), compiled.native_name.removeprefix("cfunc."))

    def _saved_file(self) -> Path | None:
        return next((file for folder in self._folders() if (file := folder / self._file_name).exists()), None)

    def _folders(self) -> list[Path]:
        return [_source_file(self.module).parent / "__pycache__", cache_folder("compiled")]

    @cached_property
    def _file_name(self) -> str:
        """A name that contains a hash of everything that determines the machine code."""
        digest = hashlib.sha256()
        for module in (self.module, *self.sources, __name__):
            digest.update(_source_file(module).read_bytes())
        digest.update(f"{version('numba')} {version('llvmlite')} {_llvm().get_process_triple()} {_host()}".encode())
        return f"{self.module.rpartition('.')[2]}.{self.name}-{digest.hexdigest()[:24]}.o"


def has_fused_multiply_add() -> bool:
    """Whether the CPU has fused multiply-add instructions. Without them, every multiply-add would be a slow function call."""
    architecture = str(_llvm().get_process_triple()).split("-")[0]
    return architecture in ("aarch64", "arm64") or "+fma" in _host()[1].split(",")


def _source_file(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


@cache
def _llvm() -> Any:
    """Import and initialize llvmlite's binding to LLVM."""
    import llvmlite.binding

    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    return llvmlite.binding


@cache
def _host() -> tuple[str, str]:
    """Return LLVM's name of this CPU and its list of features."""
    return _llvm().get_host_cpu_name(), _llvm().get_host_cpu_features().flatten()


def _target_machine() -> Any:
    """Return LLVM's code generator, with the settings that numba uses."""
    cpu, features = _host()
    target = _llvm().Target.from_triple(_llvm().get_process_triple())
    return target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="default", codemodel="jitdefault", jit=True)


def _object_code(llvm_ir: str, function: str) -> bytes:
    """Compile a numba function `int32 function(void **result, void **error, void *record)`, given its optimized LLVM IR.

    The result contains an entry point without the first two arguments and what it calls. numba's own entry point is removed,
    because it calls functions in numba's libraries.
    """
    binding = _llvm()
    entry = f"""
define void @{_ENTRY}(ptr %record) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @"{function}"(ptr %result, ptr %error, ptr %record)
  ret void
}}
"""
    module = binding.parse_assembly(llvm_ir + entry)
    for symbol in (*module.functions, *module.global_variables):
        if not symbol.is_declaration and symbol.name != _ENTRY:
            symbol.linkage = "internal"
    machine = _target_machine()
    passes = binding.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
    code: bytes = machine.emit_object(module)
    return code
