//! The data of the demo: a real image set of many small files, and generated shards.
//!
//! What a file must contain is known from here, from the generator; it is never learnt by reading.

use bytes::Bytes;
use forebay_test_store::content;
use twemoji_assets::png::PngTwemojiAsset;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Bytes of a shard.
pub const SHARD_SIZE: u64 = 64 << 20;
/// Shards.
pub const SHARDS: u64 = 4;

/// A file that a reader must find.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Path below the mount.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// xxh3-128 of the contents.
    pub sum: u128,
}

/// The image set: path and contents.
pub fn images() -> impl Iterator<Item = (String, Bytes)> {
    emojis::iter().flat_map(with_skin_tones).filter_map(|emoji| {
        let asset = PngTwemojiAsset::from_emoji(emoji.as_str())?;
        let sum = xxh3_128(emoji.as_bytes());
        // 64 directories, as data sets are sharded.
        Some((format!("images/{:02x}/{sum:032x}.png", sum % 64), Bytes::from_static(asset)))
    })
}

fn with_skin_tones(emoji: &'static emojis::Emoji) -> Vec<&'static emojis::Emoji> {
    match emoji.skin_tones() {
        Some(tones) => tones.collect(),
        None => vec![emoji],
    }
}

/// What the image must be.
pub fn expect_image(path: &str, contents: &[u8]) -> Expected {
    Expected { path: path.to_owned(), size: contents.len() as u64, sum: xxh3_128(contents) }
}

/// What the shard must be.
pub fn expect_shard(shard: u64) -> Expected {
    let mut hasher = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    for offset in (0..SHARD_SIZE).step_by(buffer.len()) {
        content::fill(shard, offset, &mut buffer);
        hasher.update(&buffer);
    }
    Expected { path: shard_path(shard), size: SHARD_SIZE, sum: hasher.digest128() }
}

/// Where the shard is.
pub fn shard_path(shard: u64) -> String {
    format!("shards/{shard:05}.bin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_set_is_of_several_thousand_files() {
        let paths: std::collections::BTreeSet<String> = images().map(|(path, _)| path).collect();
        assert!(paths.len() > 3000, "{}", paths.len());
        assert_eq!(paths.len(), images().count(), "two images share a path");
    }
}
