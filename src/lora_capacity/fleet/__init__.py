"""Adapters over many servers: which on which, how few servers, and how far that is from a bound."""

from lora_capacity.fleet.exports import exported
from lora_capacity.fleet.fleet import OBJECTIVES, Fleet, Pool
from lora_capacity.fleet.place import place
from lora_capacity.fleet.placement import PlacedServer, Placement

__all__ = ["OBJECTIVES", "Fleet", "PlacedServer", "Placement", "Pool", "exported", "place"]
