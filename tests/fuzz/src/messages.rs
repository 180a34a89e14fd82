//! What is fuzzed of the messages between nodes: any bytes must not panic, nor be taken for a
//! message with two encodings. Used by the fuzz target and, over the stored corpus, by
//! `cluster/tests/corpus.rs`.

use annulus_cluster::message::{PeerMessage, ReadResult, check_record};
use annulus_engine::model::WallMicros;

/// A shard hears a peer that passed the handshake and says anything.
pub(crate) fn messages(data: &[u8]) {
    let Ok(message) = PeerMessage::decode(data) else { return };
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    assert_eq!(bytes, data, "one encoding a message");
    let records = match &message {
        PeerMessage::Write { record, .. } => vec![*record],
        PeerMessage::ReadDone { result: ReadResult::Full { record, .. }, .. } => {
            record.iter().copied().collect()
        }
        PeerMessage::SyncPage { records, .. } => {
            assert_eq!(records.iter().count(), records.count() as usize);
            records.iter().collect()
        }
        _ => Vec::new(),
    };
    for record in records {
        let _ = check_record(&record, 7, 4, WallMicros(1 << 40));
    }
}
