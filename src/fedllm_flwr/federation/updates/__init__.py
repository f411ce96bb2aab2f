"""Update transforms, one per file: clipping, compression and casts of client updates."""
