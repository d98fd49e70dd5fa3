"The package's metadata, all of it read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser(delimiters="=", interpolation=None)
ini.read(here/"settings.ini", encoding="utf-8")
s = ini["DEFAULT"]
notebooks, dev = s["notebook_requirements"].split(), s["dev_requirements"].split()

setup(
    name=s["lib_name"],
    version=s["version"],
    description=s["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=s["author"],
    url=s["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=s["keywords"],
    packages=[s["lib_path"]],
    python_requires=f">={s['min_python']}",
    install_requires=s["requirements"].split(),
    extras_require={"notebooks": notebooks, "dev": notebooks + dev},
)
