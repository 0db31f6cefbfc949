"""Folders that can be shared: ``se.safetensors``, ``config.json`` and a model card, and the Hub.

``save_se`` writes one with ``folder.write_folder``. ``load_se`` and everything that takes a file of
SE blocks find it with ``folder.weights_file``, which takes a file, such a folder or
``hf-hub:user/repo``; ``pretrained.from_pretrained`` builds the base too. huggingface_hub is
imported only where the Hub is asked, or a card is written.
"""
