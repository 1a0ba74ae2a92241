"""Package definition; every dependency has both bounds of the versions known to work."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "biclip_jax/__init__.py").read_text()).group(1)

JAX = "0.10.2,<0.13"

# Enough to train on the synthetic dataset, to predict on image files, and to convert checkpoints.
CORE = [
    f"jax>={JAX}",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<1.0",
    "numpy>=2.0,<3",
    "ml_collections>=1.1.0,<2",
    "ml_dtypes>=0.5,<1",
    "scipy>=1.15,<2",  # jax needs it anyway
    "tokenizers>=0.22,<0.24",
    "safetensors>=0.6,<1",
    "jaxtyping>=0.3.4,<0.4",
    "pillow>=11,<14",
    "matplotlib>=3.9,<4",  # plots and overlays of every run
    "rich>=14,<16",
]

EXTRAS = {
    # Datasets on disk: prepared by TFDS as array_record files, read ahead by grain; Excel sheets.
    "train": [
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6,<8",  # imported by tensorflow-datasets, which does not declare it
        "array_record>=0.8.3,<0.9",
        "grain>=0.2.18,<0.3",
        "openpyxl>=3.1,<4",
    ],
    # DICOM files, with JPEG-LS.
    "medical": ["pydicom>=3.0.1,<4", "pyjpegls>=1.2,<2"],
    # Downloads from the Hugging Face hub, and CLIP tokenizers stored as vocab.json and merges.txt.
    "hub": ["huggingface_hub>=1.0,<3", "transformers>=5.0,<6"],
    "report": ["jinja2>=3.1,<4"],
    "tensorboard": ["tensorboardX>=2.6,<3"],
}
ALL = sorted({requirement for requirements in EXTRAS.values() for requirement in requirements})

setup(
    name="biclip_jax",
    version=VERSION,
    description="Text-prompted medical image segmentation in pure JAX: BiCLIP and MedCLIPSeg",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The biclip_jax authors",
    license="Apache-2.0",
    keywords=[
        "medical image segmentation",
        "vision-language",
        "CLIP",
        "JAX",
        "Flax",
        "semi-supervised learning",
        "uncertainty",
    ],
    project_urls={
        "BiCLIP (paper)": "https://arxiv.org/abs/2603.00156",
        "MedCLIPSeg (paper)": "https://arxiv.org/abs/2602.20423",
    },
    python_requires=">=3.11",
    # With "." an editable install adds the checkout to sys.path, instead of an import hook that
    # loses against a folder of the same name in the working directory.
    package_dir={"": "."},
    # biclip_jax/configs is a symlink to configs/, which is installed inside the package.
    packages=find_packages(include=["biclip_jax", "biclip_jax.*"]),
    package_data={"biclip_jax": ["py.typed"], "biclip_jax.evaluation.report": ["*.jinja"]},
    install_requires=CORE,
    extras_require={
        **EXTRAS,
        "all": ALL,
        "gpu": [f"jax[cuda12]>={JAX}"],
        "tpu": [f"jax[tpu]>={JAX}"],
        "test": [
            *ALL,
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.12,<1",
            "mypy>=1.15,<3",
            "beartype>=0.21,<1",
            "build>=1.2,<2",
            "pre-commit>=4,<5",
        ],
        "parity": ["torch==2.13.0", "opencv-python-headless>=4.10,<6"],
    },
    entry_points={"console_scripts": ["biclip=biclip_jax.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Healthcare Industry",
        # File locks use fcntl.
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
)
