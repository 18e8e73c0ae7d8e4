"""Build steps that setup.cfg cannot express; all metadata lives there."""

from setuptools import setup

setup()
