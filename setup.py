"""Package definition: versions that are known to work together, with both bounds."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "biclip_jax/__init__.py").read_text()).group(1)

setup(
    name="biclip_jax",
    version=VERSION,
    description="BiCLIP in pure JAX: medical image segmentation with the help of a sentence",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The experiment configurations lie at the top level and are installed inside the package.
    package_data={"biclip_jax.evaluation": ["*.jinja"]},
    packages=find_packages(include=["biclip_jax", "biclip_jax.*"]),
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<1.0",
        "numpy>=2.0,<3",
        "ml_collections>=1.1.0,<2",
        "transformers>=5.0,<6",
        "tokenizers>=0.22,<0.24",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6,<8",  # tensorflow-datasets needs it and does not say so
        "grain>=0.2.18,<0.3",
        "array_record>=0.8.3,<0.9",
        "safetensors>=0.6,<1",
        "ml_dtypes>=0.5,<1",
        "huggingface_hub>=1.0,<3",
        "jaxtyping>=0.3.4,<0.4",
        "pillow>=11,<14",
        "matplotlib>=3.9,<4",
        "openpyxl>=3.1,<4",
        "pydicom>=3.0.1,<4",
        "scipy>=1.15,<2",
        "jinja2>=3.1,<4",
        "rich>=14,<16",
    ],
    extras_require={
        "gpu": ["jax[cuda12]>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "medical": ["pyjpegls>=1.2,<2"],  # JPEG-LS in DICOM files
        "tensorboard": ["tensorboardX>=2.6,<3"],
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.12,<1",
            "mypy>=1.15,<3",
            "beartype>=0.21,<1",
            "build>=1.2,<2",
            "tensorboardX>=2.6,<3",
            "pyjpegls>=1.2,<2",
        ],
        "parity": ["torch==2.13.0", "opencv-python-headless>=4.10,<6"],
    },
    entry_points={"console_scripts": ["biclip=biclip_jax.train:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
