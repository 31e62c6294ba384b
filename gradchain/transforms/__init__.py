"""The catalogue: one small family of transforms a file. Every name is exported by ``gradchain`` itself."""
