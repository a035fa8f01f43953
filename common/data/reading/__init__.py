"""From files to images: verified downloads, image folders, photographs to blend with."""
