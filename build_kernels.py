"""Part of the package's build: compiles the CPU kernels into the wheel, or in place for an editable install."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILDER = Path("src/whit/kernels/cpu/build.py")


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        spec = importlib.util.spec_from_file_location("whit_build", Path(self.root) / BUILDER)
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        try:
            if not builder.is_current():  # a checkout is installed more than once: with extras, again after a pull
                builder.build()
        except (RuntimeError, OSError) as error:
            builder.LIBRARY.unlink(missing_ok=True)
            self.app.display_warning(f"whit is installed without its CPU kernels: {error}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append(str(builder.LIBRARY.relative_to(Path(self.root).resolve())))
