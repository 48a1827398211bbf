"""Language modelling: a small decoder, or any causal model of transformers, on text files or the standard library's own source."""

from pl_normkit.recipes.language.corpus import pack as pack
from pl_normkit.recipes.language.data import StandardLibrary as StandardLibrary
from pl_normkit.recipes.language.data import TextData as TextData
from pl_normkit.recipes.language.data import TextFolder as TextFolder
from pl_normkit.recipes.language.main import RECIPE as RECIPE
from pl_normkit.recipes.language.model import LanguageModule as LanguageModule
from pl_normkit.recipes.language.network import build_network as build_network
from pl_normkit.recipes.language.writer import TextWriter as TextWriter

__all__ = ["RECIPE", "LanguageModule", "StandardLibrary", "TextData", "TextFolder", "TextWriter", "build_network", "pack"]
