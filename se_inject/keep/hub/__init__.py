"""Folders to share, with ``se.safetensors``, ``config.json`` and a model card, and the Hub.

``save_se`` writes such a folder with ``folder.write_folder``. ``load_se`` and everything else that
takes a file of SE blocks finds it with ``folder.weights_file``, which takes a file, such a folder
or ``hf-hub:user/repo``. ``pretrained.from_pretrained`` builds the base too. huggingface_hub is
imported only when the Hub is asked or a card is written.
"""
