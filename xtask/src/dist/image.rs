//! The image, as an OCI layout in an archive, for one architecture or several.
//! Source: OCI image-spec 1.1, `image-layout.md` and `image-index.md`.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result};
use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, DescriptorBuilder, ImageConfigurationBuilder,
    ImageIndexBuilder, ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder,
    RootFsBuilder, Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::{
    BINARY, Machine, VERSION,
    archive::{archive, put, remove},
    rfc3339,
};

/// One architecture's image.
pub(super) struct Image {
    machine: Machine,
    blobs: Blobs,
    manifest: Descriptor,
}

/// What an image consists of, by checksum.
#[derive(Clone, Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Adds one; how others refer to it.
    fn add(&mut self, bytes: Vec<u8>, kind: MediaType) -> Result<DescriptorBuilder> {
        let digest = format!("{:x}", Sha256::digest(&bytes));
        let descriptor = DescriptorBuilder::default()
            .media_type(kind)
            .digest(digest.parse::<Sha256Digest>()?)
            .size(u64::try_from(bytes.len())?);
        self.0.insert(digest, bytes);
        Ok(descriptor)
    }
}

impl Image {
    /// The image with this one layer.
    pub(super) fn new(layer: Vec<u8>, machine: Machine, epoch: u64) -> Result<Self> {
        let mut blobs = Blobs::default();
        let layer = blobs.add(layer, MediaType::ImageLayer)?.build()?;
        let arch = Arch::from(machine.debian());
        let config = ImageConfigurationBuilder::default()
            .created(rfc3339(epoch)?)
            .architecture(arch.clone())
            .os(Os::Linux)
            .config(
                ConfigBuilder::default()
                    .entrypoint(vec![format!("/{BINARY}")])
                    .env(vec!["PATH=/usr/local/bin".to_owned()])
                    .build()?,
            )
            .rootfs(
                RootFsBuilder::default()
                    .typ("layers")
                    .diff_ids(vec![layer.digest().to_string()])
                    .build()?,
            )
            .history(vec![])
            .build()?;
        let config = blobs.add(json(&config)?, MediaType::ImageConfig)?.build()?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(vec![layer])
            .build()?;
        let platform = PlatformBuilder::default().architecture(arch).os(Os::Linux).build()?;
        let manifest =
            blobs.add(json(&manifest)?, MediaType::ImageManifest)?.platform(platform).build()?;
        Ok(Self { machine, blobs, manifest })
    }
}

/// The layout of `images` as an archive; it is put together in `dir`. Of several, an index of all has the
/// image's name.
pub(super) fn layout(dir: &Path, images: &[&Image], epoch: u64) -> Result<Vec<u8>> {
    let mut blobs = Blobs::default();
    for image in images {
        blobs.0.extend(image.blobs.0.clone());
    }
    let mut named = match images {
        [image] => image.manifest.clone(),
        images => {
            let index = index(images.iter().map(|image| image.manifest.clone()).collect())?;
            blobs.add(index, MediaType::ImageIndex)?.build()?
        }
    };
    let reference = format!("docker.io/library/redirect-agent:{VERSION}");
    named.set_annotations(Some(
        [
            // containerd's name for it, and everybody's.
            ("io.containerd.image.name".to_owned(), reference),
            ("org.opencontainers.image.ref.name".to_owned(), VERSION.to_owned()),
        ]
        .into(),
    ));
    let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
    remove(dir)?;
    for (digest, bytes) in &blobs.0 {
        put(&dir.join("blobs/sha256").join(digest), bytes)?;
    }
    put(&dir.join("index.json"), &index(vec![named])?)?;
    put(&dir.join("oci-layout"), &json(&layout)?)?;
    let made = archive(dir, epoch)?;
    remove(dir)?;
    Ok(made)
}

fn index(manifests: Vec<Descriptor>) -> Result<Vec<u8>> {
    let index = ImageIndexBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageIndex)
        .manifests(manifests)
        .build()?;
    json(&index)
}

/// The fields in the order of their names, whatever the maps that they are from.
fn json(document: &impl Serialize) -> Result<Vec<u8>> {
    let value = serde_json::to_value(document).context("write a document of the image")?;
    serde_json::to_vec(&value).context("write a document of the image")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::dist::archive::tests::files;

    /// The files of a layout, and what a descriptor in it refers to.
    struct Layout(BTreeMap<String, Vec<u8>>);

    impl Layout {
        fn of(images: &[&Image]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self(files(&layout(&dir.path().join("image"), images, 7).unwrap()))
        }

        fn read(&self, name: &str) -> Value {
            serde_json::from_slice(&self.0[name]).unwrap()
        }

        fn blob(&self, descriptor: &Value) -> Vec<u8> {
            let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let content = self.0[&format!("blobs/sha256/{digest}")].clone();
            assert_eq!(digest, format!("{:x}", Sha256::digest(&content)));
            assert_eq!(descriptor["size"], content.len());
            content
        }

        fn document(&self, descriptor: &Value) -> Value {
            serde_json::from_slice(&self.blob(descriptor)).unwrap()
        }
    }

    #[test]
    fn image_names_its_parts_by_their_checksums() {
        let image = Image::new(b"a layer".to_vec(), Machine::Amd64, 7).unwrap();
        let layout = Layout::of(&[&image]);
        assert_eq!(layout.read("oci-layout")["imageLayoutVersion"], "1.0.0");
        let manifest = layout.document(&layout.read("index.json")["manifests"][0]);
        assert_eq!(layout.blob(&manifest["layers"][0]), b"a layer");
        let config = layout.document(&manifest["config"]);
        assert_eq!(config["architecture"], "amd64");
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        assert_eq!(config["config"]["Entrypoint"][0], "/usr/local/bin/redirect-agent");
        assert_eq!(config["created"], "1970-01-01T00:00:07Z");
    }

    #[test]
    fn image_for_several_architectures_has_one_name_and_each_ones_binary() {
        let amd64 = Image::new(b"for amd64".to_vec(), Machine::Amd64, 7).unwrap();
        let arm64 = Image::new(b"for arm64".to_vec(), Machine::Arm64, 7).unwrap();
        let layout = Layout::of(&[&amd64, &arm64]);
        let named = &layout.read("index.json")["manifests"];
        assert_eq!(named.as_array().unwrap().len(), 1);
        assert_eq!(named[0]["mediaType"], "application/vnd.oci.image.index.v1+json");
        assert_eq!(named[0]["annotations"]["org.opencontainers.image.ref.name"], VERSION);
        let manifests = layout.document(&named[0])["manifests"].clone();
        assert_eq!(manifests.as_array().unwrap().len(), 2);
        for (descriptor, arch) in manifests.as_array().unwrap().iter().zip(["amd64", "arm64"]) {
            assert_eq!(descriptor["platform"]["architecture"], arch);
            assert_eq!(descriptor["platform"]["os"], "linux");
            let manifest = layout.document(descriptor);
            assert_eq!(layout.document(&manifest["config"])["architecture"], arch);
            let content = layout.blob(&manifest["layers"][0]);
            assert_eq!(content, format!("for {arch}").into_bytes());
        }
    }
}
