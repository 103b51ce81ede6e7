"""A PEP 517 backend: setuptools' own, plus ``-C backend=...`` and requirements found by looking.

setuptools does not pass config settings on to setup.py, and a static requirement would install
cmake and ninja again where the system has them already, at a new path for each build.
"""

import os
from collections.abc import Mapping

from cmake_build import BACKENDS, requirements
from setuptools import build_meta

ConfigSettings = Mapping[str, str | list[str]] | None

build_sdist = build_meta.build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """Return what this machine lacks of cmake, ninja and (to fetch llama.cpp) pip."""
    return requirements()


def get_requires_for_build_sdist(config_settings: ConfigSettings = None) -> list[str]:
    """Return the same; an sdist carries the llama.cpp tree."""
    return requirements()


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel for the backend that ``-C backend=NAME`` names."""
    _select_backend(config_settings)
    return str(build_meta.build_wheel(wheel_directory, None, metadata_directory))


def build_editable(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build an editable wheel for the backend that ``-C backend=NAME`` names."""
    _select_backend(config_settings)
    return str(build_meta.build_editable(wheel_directory, None, metadata_directory))


def _select_backend(config_settings: ConfigSettings) -> None:
    settings = dict(config_settings or {})
    backend = settings.pop("backend", None)
    if settings:
        raise ValueError(f"unknown build settings {sorted(settings)}; known: backend")
    if backend is not None:
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}; choose one of {', '.join(BACKENDS)}")
        os.environ["LLAMA_CRAB_BUILD_BACKEND"] = backend
