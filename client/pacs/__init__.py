"""From a hospital's archive (PACS) to a folder of the site: queries go out, nothing else does."""
