"""A plugin that is right, and some that are wrong in one thing each, as installed distributions.

``CAUGHT_BY``: the check of the suite that is there for it.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

from lmcache_kit.testing import PluginSuite

SITE = Path(tempfile.mkdtemp(prefix="kit-plugins-"))
atexit.register(shutil.rmtree, SITE)
sys.path.insert(0, str(SITE))

HEAD = """
from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import CodecSpec, RouteSpec
"""
GOOD = """
@hookimpl
def register_codecs():
    return [CodecSpec("{name}", "{name}.codec:Mine", "a codec", "{name}.codec:Options",
                      probe="{name}.codec:why_not")]

@hookimpl
def register_routes():
    return [RouteSpec("{name}", "{name}.codec:answer", "a route", method="GET",
                      path="/levels/{{level}}", request="{name}.codec:Asked",
                      reply="{name}.codec:Told")]
"""
CODEC = """
from pydantic import BaseModel
from lmcache_kit.interfaces import BlobInfo, Codec

class Options(BaseModel, extra="forbid"):
    level: int = 1

def why_not():
    return ""

class Asked(BaseModel, extra="forbid"):
    level: int

class Told(BaseModel):
    level: int

async def answer(controller, request):
    return Told(level=request.level)

class Mine(Codec):
    format_version = 1
    def encode(self, payload, chunk): return bytes(payload)
    def decode(self, blob, chunk, out): out[:] = blob
    def describe(self, blob): return BlobInfo(1, 0, len(blob), len(blob))
    def max_blob_bytes(self, chunk): return chunk.payload_bytes
"""


def install(name, plugin=GOOD, codec=CODEC, *, group="lmcache_kit.v1", needs="lmcache-kit<1"):
    """A distribution ``acme-<name>`` with a package of the same name."""
    package = f"acme_{name.lower()}"
    folder = SITE / package
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "py.typed").touch()
    (folder / "plugin.py").write_text(HEAD + textwrap.dedent(plugin).format(name=package))
    (folder / "codec.py").write_text(codec)
    info = SITE / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: acme-{name.lower()}\nVersion: 1.0\n"
        + (f"Requires-Dist: {needs}\n" if needs else "")
    )
    (info / "entry_points.txt").write_text(f"[{group}]\n{package} = {package}.plugin\n")
    return folder


def replaced(old, new, text=GOOD):
    assert old in text
    return text.replace(old, new)


install("Right")
install("ImportsNumpy", "import numpy\n" + GOOD)
install("ImportsItsCodec", "import {name}.codec\n" + GOOD)
install("HasNoSummary", replaced('"a codec"', '""'))
install("MisspellsAHook", replaced("register_codecs", "register_codec"))
install("ForgetsTheMarker", replaced("@hookimpl", ""))
install("NamesNoTarget", replaced("codec:Mine", "codec:Yours"))
install("OffersAnotherKind", codec=replaced("class Mine(Codec)", "class Mine", CODEC))
install("IsNotDone", codec=replaced("    def describe", "    def describe_", CODEC))
install("WantsAnOption", codec=replaced("level: int = 1", "level: int", CODEC))
install("IgnoresMisspeltOptions", codec=replaced(', extra="forbid"', "", CODEC))
install("TellsNothing", codec=replaced('return ""', "return None", CODEC))
install("OffersTwice", GOOD.replace("return [", "return 2 * ["))
install("HasAnOddName", replaced('CodecSpec("{name}"', 'CodecSpec("my codec!"'))
install("ListsCapabilities", replaced('probe="', 'capabilities=["fast"], probe="'))
install(
    "ChangesItsMind",
    "count = []\n" + replaced('"a codec"', 'f"codec {{count.append(1) or len(count)}}"'),
)
install("AnswersWithoutAsync", codec=replaced("async def", "def", CODEC))
install("HasNoFieldForAName", replaced("{{level}}", "{{depth}}"))
install(
    "IgnoresMisspeltFields",
    codec=replaced('Asked(BaseModel, extra="forbid")', "Asked(BaseModel)", CODEC),
)
install("IsOfAnotherVersion", group="lmcache_kit.v0")
install("DependsOnNothing", needs="")
(install("IsUntyped") / "py.typed").unlink()

CAUGHT_BY = {
    "ImportsNumpy": "test_its_module_is_light",
    "ImportsItsCodec": "test_its_module_is_light",
    "HasNoSummary": "test_summaries_are_one_line",
    "MisspellsAHook": "test_it_loads_without_a_failure",
    "ForgetsTheMarker": "test_it_offers_something_or_takes_part_in_something",
    "NamesNoTarget": "test_targets_are_what_they_are_offered_as",
    "OffersAnotherKind": "test_targets_are_what_they_are_offered_as",
    "IsNotDone": "test_targets_are_what_they_are_offered_as",
    "WantsAnOption": "test_options_are_pydantic_models_with_defaults",
    "IgnoresMisspeltOptions": "test_options_are_pydantic_models_with_defaults",
    "TellsNothing": "test_probes_tell_quickly",
    "OffersTwice": "test_names_are_plain_and_its_own",
    "HasAnOddName": "test_names_are_plain_and_its_own",
    "ListsCapabilities": "test_capabilities_are_names",
    "ChangesItsMind": "test_it_says_the_same_again",
    "AnswersWithoutAsync": "test_routes_can_be_served",
    "HasNoFieldForAName": "test_routes_can_be_served",
    "IgnoresMisspeltFields": "test_routes_can_be_served",
    "IsOfAnotherVersion": "test_it_loads_without_a_failure",
    "DependsOnNothing": "test_it_says_what_it_needs",
    "IsUntyped": "test_it_is_typed",
}

globals().update(
    {
        f"Test{name}": type(f"Test{name}", (PluginSuite,), {"distribution": f"acme-{name.lower()}"})
        for name in ("Right", *CAUGHT_BY)
    }
)
