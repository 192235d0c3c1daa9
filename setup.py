"""Packages and where they lie: ``kernels/`` is installed as ``fastvae.kernels``. Metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["fastvae", "fastvae.*"]),
        "fastvae.kernels",
        *(f"fastvae.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastvae.kernels": "kernels"},
    package_data={"fastvae": ["py.typed"]},
)
