//! Reading a shard in every way there is, in the model's terms; and what lies in its directory.
//!
//! Invariant: a scan that is out of order, shows a key twice, or with another token, panics here.

#![expect(clippy::unwrap_used, reason = "a reader that cannot go on has failed its test")]

use std::path::Path;

use annulus_engine::Result;
use annulus_engine::model::siblings::KeyState;
use annulus_engine::model::{Kind, NamespaceId, RecordRef, Token, TokenRange, WallMicros};
use annulus_engine::shard::ScanRequest;
use annulus_engine::sim::SimDisk;

use crate::model::{Contents, KeyName, name};
use crate::store::{SimShard, dir};
use crate::workload::{SIBLINGS, token_of};

/// What a client gets of a record: its value, or all live siblings as one list.
pub(crate) fn readable(record: &RecordRef<'_>, now_ms: u64) -> Option<Vec<u8>> {
    let now = WallMicros(now_ms * 1000);
    if record.namespace == SIBLINGS {
        let state = KeyState::of_record(record).expect("a whole state");
        let mut values: Vec<Vec<u8>> = state.live(now).map(|s| s.value.to_vec()).collect();
        values.sort();
        return join(values);
    }
    assert!(record.kind != Kind::Siblings, "siblings where the last write wins");
    record.is_live(now).then(|| record.value.to_vec())
}

/// Siblings as one value, each behind its length.
pub(crate) fn join(values: Vec<Vec<u8>>) -> Option<Vec<u8>> {
    if values.is_empty() {
        return None;
    }
    let mut joined = Vec::new();
    for value in values {
        joined.extend_from_slice(&u64::try_from(value.len()).unwrap().to_le_bytes());
        joined.extend_from_slice(&value);
    }
    Some(joined)
}

/// What a reader gets of one key.
///
/// # Errors
/// As [`Shard::get`](annulus_engine::shard::Shard::get).
pub async fn read(shard: &SimShard, key: &KeyName, now_ms: u64) -> Result<Option<Vec<u8>>> {
    let record = shard.get(token_of(key), key.0, &key.1).await?;
    Ok(record.and_then(|record| readable(&record.as_ref(), now_ms)))
}

/// All that a reader sees, by one scan.
///
/// # Errors
/// As [`Shard::scan`](annulus_engine::shard::Shard::scan).
pub async fn contents(shard: &SimShard, now_ms: u64) -> Result<Contents> {
    let request = ScanRequest { range: TokenRange::FULL, after: None, namespace: None };
    let mut found = Contents::new();
    let mut last = None;
    let mut visit = |record: &RecordRef<'_>| {
        take(record, now_ms, &mut last, &mut found);
        true
    };
    assert_eq!(shard.scan(&request, &mut visit).await?, None);
    Ok(found)
}

/// All that a reader sees of a namespace, page by page.
pub(crate) async fn pages(
    shard: &SimShard,
    namespace: NamespaceId,
    page: usize,
    now_ms: u64,
) -> Result<Contents> {
    let (mut found, mut last) = (Contents::new(), None);
    let (mut range, mut after) = (TokenRange::FULL, Vec::new());
    loop {
        let behind = (!after.is_empty()).then_some((namespace, after.as_slice()));
        let request = ScanRequest { range, after: behind, namespace: Some(namespace) };
        let mut count = 0;
        let mut visit = |record: &RecordRef<'_>| {
            take(record, now_ms, &mut last, &mut found);
            count += 1;
            count < page
        };
        match shard.scan(&request, &mut visit).await? {
            Some((token, key)) => (range.first, after) = (token, key),
            None => return Ok(found),
        }
    }
}

/// Checks order and token of a scanned record, and keeps it if it is live.
fn take(
    record: &RecordRef<'_>,
    now_ms: u64,
    last: &mut Option<(Token, KeyName)>,
    found: &mut Contents,
) {
    let key = (record.namespace, record.key.to_vec());
    assert_eq!(record.token, token_of(&key), "{}: not its token", name(&key));
    let place = (record.token, key.clone());
    assert!(last.as_ref().is_none_or(|last| *last < place), "{}: out of order", name(&key));
    *last = Some(place);
    if let Some(value) = readable(record, now_ms) {
        found.insert(key, value);
    }
}

/// Panics when the directory holds anything that the open shard does not need.
pub fn check_files(disk: &SimDisk, shard: &SimShard) {
    let stats = shard.stats();
    let mut tables = 0;
    let mut manifests = 0;
    for (path, _) in disk.files() {
        let name = path.file_name().unwrap().to_str().unwrap();
        let place = path.parent().and_then(Path::file_name).and_then(|dir| dir.to_str());
        match place {
            Some("table") if path.extension().is_some_and(|e| e == "sst") => tables += 1,
            Some("log") if path.extension().is_some_and(|e| e == "log") => {}
            // A segment that is being prepared at this moment.
            Some("log") if path.extension().is_some_and(|e| e == "tmp") => {}
            _ if name.starts_with("MANIFEST-") => manifests += 1,
            _ => assert!(["IDENTITY", "WARM"].contains(&name), "left over: {}", path.display()),
        }
    }
    assert_eq!(tables, stats.tables, "tables on the disk and tables in use");
    assert_eq!(manifests, 1, "manifests");
    let segments =
        disk.files().iter().filter(|(path, _)| path.starts_with(dir().join("log"))).count();
    let log = stats.log;
    let known = log.segments_live + log.segments_ready + log.segments_free;
    assert!(segments <= known + 1, "{segments} log segments on the disk, {known} known");
}
