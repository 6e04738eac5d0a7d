"""Metadata. From a checkout: pip install -c constraints.txt -e .  (or .[test])"""

from setuptools import setup

setup(
    name="coser",
    version="0.1.0",
    description="CoSER in pure PyTorch: train an actor, put it on stage, judge it",
    license="MIT",
    python_requires=">=3.11",
    py_modules=[
        "checkpoint",
        "cli",
        "constrain",
        "costs",
        "engine",
        "fast_linear",
        "generate",
        "judge",
        "llm",
        "lookup",
        "loss",
    ]
    + ["metrics", "model", "pages", "protocol", "report", "resume", "runlog", "simulate", "tokenizer", "train"],
    packages=["data", "kernels"],
    package_data={"data": ["published_results.json", "report.html", "stage/*", "stage/actor/*"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "sentencepiece",
        "tiktoken",
        "safetensors",
        "numpy",
        "httpx",  # endpoints
        "jinja2",  # the report
        "matplotlib",  # loss.png
        "nltk",  # BLEU
        "rich",  # the terminal
    ],
    extras_require={"test": ["pytest", "hypothesis", "rouge==1.0.0", "ruff", "transformers"]},
)
