"""One project is made and cached once; each test works on a copy of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.project import Project, copy_project, write_project


@pytest.fixture(scope="session")
def cached_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project whose clips are cached. Tests copy it."""
    project = write_project(tmp_path_factory.mktemp("project"))
    project.done("cache", project.config)
    return project


@pytest.fixture
def project(cached_project: Project, tmp_path: Path) -> Project:
    """Return a cached project of the test's own."""
    return copy_project(cached_project, tmp_path / "project")
