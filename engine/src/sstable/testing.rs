//! What the tests of tables share: a file in memory, and makers of records.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::{Table, TableId, TableIdentity, TableMeta, TableOptions, TableWriter};
use crate::buffer::AlignedBuf;
use crate::disk::{File, WriteMode};
use crate::error::Result;
use crate::model::{Dot, Kind, NamespaceId, OriginId, Record, Timestamp, Token};

/// A file in memory that counts its reads.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemFile {
    pub(crate) bytes: Rc<RefCell<Vec<u8>>>,
    pub(crate) reads: Rc<Cell<usize>>,
    alignment: usize,
}

impl MemFile {
    pub(crate) fn new(alignment: usize) -> MemFile {
        MemFile { alignment, ..MemFile::default() }
    }

    pub(crate) fn of(bytes: Vec<u8>) -> MemFile {
        let file = MemFile::new(512);
        *file.bytes.borrow_mut() = bytes;
        file
    }
}

impl File for MemFile {
    fn alignment(&self) -> usize {
        self.alignment
    }

    fn read_at(
        &self,
        offset: u64,
        len: usize,
    ) -> impl Future<Output = Result<AlignedBuf>> + 'static {
        assert!(offset.is_multiple_of(self.alignment as u64) && len.is_multiple_of(self.alignment));
        self.reads.set(self.reads.get() + 1);
        let bytes = self.bytes.borrow();
        let start = usize::try_from(offset).unwrap().min(bytes.len());
        let end = (start + len).min(bytes.len());
        let mut buf = AlignedBuf::with_capacity(len);
        buf.extend_from_slice(&bytes[start..end]);
        std::future::ready(Ok(buf))
    }

    fn write_at(
        &self,
        offset: u64,
        buf: AlignedBuf,
        _mode: WriteMode,
    ) -> impl Future<Output = (AlignedBuf, Result<()>)> + 'static {
        assert!(offset.is_multiple_of(self.alignment as u64));
        assert!(buf.len().is_multiple_of(self.alignment));
        let mut bytes = self.bytes.borrow_mut();
        let start = usize::try_from(offset).unwrap();
        let end = start + buf.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(&buf);
        std::future::ready((buf, Ok(())))
    }

    fn sync(&self) -> impl Future<Output = Result<()>> + 'static {
        std::future::ready(Ok(()))
    }

    fn len(&self) -> impl Future<Output = Result<u64>> + 'static {
        std::future::ready(Ok(self.bytes.borrow().len() as u64))
    }

    fn set_len(&self, len: u64) -> impl Future<Output = Result<()>> + 'static {
        self.bytes.borrow_mut().resize(usize::try_from(len).unwrap(), 0);
        std::future::ready(Ok(()))
    }

    fn punch(&self, _offset: u64, _len: u64) -> impl Future<Output = Result<()>> + 'static {
        std::future::ready(Ok(()))
    }
}

/// Polls a future to its end; for files that are always ready.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}

pub(crate) fn identity() -> TableIdentity {
    let id = TableId(7);
    TableIdentity { id, salt: super::file_salt(1, 2, id), path: PathBuf::from("0000000007.sst") }
}

pub(crate) fn record(token: u64, key: &[u8], value: &[u8]) -> Record {
    Record {
        token: Token(token),
        namespace: NamespaceId(1),
        incarnation: 1,
        kind: Kind::Put,
        dot: Dot { origin: OriginId(1), sequence: 77 },
        timestamp: Timestamp(1 << 50),
        expiry_ms: 0,
        key: key.to_vec(),
        value: value.to_vec(),
    }
}

/// Writes the records, which are sorted, as a table.
pub(crate) fn write(file: &MemFile, records: &[Record], options: TableOptions) -> TableMeta {
    block_on(async {
        let mut writer = TableWriter::new(file.clone(), identity(), options);
        for record in records {
            writer.append(&record.as_ref(), &async || ()).await.unwrap();
            if writer.should_flush() {
                writer.flush().await.unwrap();
            }
        }
        writer.finish().await.unwrap()
    })
}

pub(crate) fn open(file: &MemFile) -> Result<Table<MemFile>> {
    block_on(Table::open(file.clone(), identity()))
}

pub(crate) fn get(table: &Table<MemFile>, record: &Record) -> Result<Option<Record>> {
    block_on(table.get(record.token, record.namespace, &record.key))
}
