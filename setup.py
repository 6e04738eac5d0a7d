"""Dependencies. The code runs from a checkout: pip install -c constraints.txt -e .  (or .[test])"""

import sys

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class CheckoutOnly(bdist_wheel):
    """Refuses a copy in site-packages, where modules called `data` and `model` would be everybody's."""

    def run(self):
        sys.exit("error: CoSER runs from a checkout; install it with `pip install -e .` (note the -e)")


setup(
    name="coser",
    version="0.1.0",
    description="CoSER in pure PyTorch: train an actor, put it on stage, judge it",
    license="MIT",
    python_requires=">=3.11",
    py_modules=["benchmark", "generate", "judge", "model", "serve", "simulate", "tokenizer", "train"],
    packages=[
        *("checkpoint", "common", "data", "engine", "evals", "kernels", "llm", "play", "serving"),
        *("text", "training"),
    ],
    cmdclass={"bdist_wheel": CheckoutOnly},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "regex",  # how text splits into words
        "sentencepiece",
        "tiktoken",
        "safetensors",
        "gguf",  # llama.cpp's files: dequantisation
        "numpy",
        "httpx",  # endpoints
        "jinja2",  # the report
        "matplotlib",  # loss.png
        "nltk",  # BLEU
        "pillow",  # the picture of a character card
        "rich",  # the terminal
    ],
    extras_require={
        "bench": ["transformers", "xllamacpp"],  # the peers of bench.py
        "retrieval": ["bm25s"],  # simulate.py --retrieve
        "serve": ["starlette", "uvicorn"],
        "test": [
            *("bm25s", "hypothesis", "peft", "pytest", "rouge==1.0.0", "ruff", "transformers"),
            *("openai", "starlette", "uvicorn"),  # of the server
            "playwright",  # of the page; the browser is Debian's chromium
        ],
    },
)
