"""Signalbox and its peers under the same load: `signalbox load peers`."""
