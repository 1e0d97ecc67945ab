"""The executions table. Room is left on its pages: claim and settle update a row several times in its short life."""

import django.db.models.deletion
import django.db.models.functions.datetime
import flows.models
from django.db import migrations, models


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('devboxes', '0001_initial'),
        ('hosts', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='Execution',
            fields=[
                ('id', flows.models.IdField(primary_key=True, serialize=False)),
                ('created_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False)),
                ('completed_at', models.DateTimeField(blank=True, editable=False, null=True)),
                ('step', models.TextField()),
                ('step_since', models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False)),
                ('attempts', models.IntegerField(db_default=0, editable=False)),
                ('wake_at', models.DateTimeField(blank=True, db_default=django.db.models.functions.datetime.Now(), editable=False, null=True)),
                ('wakes', models.IntegerField(db_default=0, editable=False)),
                ('lease', models.TextField(blank=True, editable=False, null=True)),
                ('lease_until', models.DateTimeField(blank=True, editable=False, null=True)),
                ('fence', models.BigIntegerField(db_default=0, editable=False)),
                ('deadline_at', models.DateTimeField(blank=True, editable=False, null=True)),
                ('error_code', models.TextField(blank=True, editable=False, null=True)),
                ('error_detail', models.TextField(blank=True, editable=False, null=True)),
                ('account_id', models.TextField()),
                ('command_id', models.TextField(blank=True, help_text="The caller's own id, unique in its devbox.", null=True)),
                ('request_key', models.TextField(blank=True, help_text='Operation and x-request-id, for repetitions.', null=True)),
                ('command', models.TextField()),
                ('shell_name', models.TextField(blank=True, null=True)),
                ('attach_stdin', models.BooleanField(db_default=False)),
                ('user_name', models.TextField()),
                ('user_uid', models.PositiveBigIntegerField()),
                ('user_home', models.TextField()),
                ('status', models.TextField(choices=[('queued', 'Queued'), ('running', 'Running'), ('completed', 'Completed')], db_default='queued', default='queued')),
                ('stop_why', models.TextField(blank=True, help_text='Who wants it stopped; null: nobody.', null=True)),
                ('stop_group', models.BooleanField(db_default=False)),
                ('exit_status', models.IntegerField(blank=True, null=True)),
                ('reason', models.JSONField(blank=True, help_text='Why it ended, when the exit status does not tell.', null=True)),
                ('started_at', models.DateTimeField(blank=True, null=True)),
                ('exited_at', models.DateTimeField(blank=True, null=True)),
                ('kept', models.TextField(choices=[('host', 'Host'), ('row', 'Row'), ('store', 'Store'), ('nowhere', 'Nowhere')], db_default='host', default='host')),
                ('stdout', models.BinaryField(blank=True, null=True)),
                ('stderr', models.BinaryField(blank=True, null=True)),
                ('out_size', models.BigIntegerField(db_default=0)),
                ('err_size', models.BigIntegerField(db_default=0)),
                ('out_dropped', models.BigIntegerField(db_default=0, help_text='Bytes the host did not keep.')),
                ('err_dropped', models.BigIntegerField(db_default=0)),
                ('out_hole', models.BigIntegerField(blank=True, null=True)),
                ('err_hole', models.BigIntegerField(blank=True, null=True)),
                ('upload', models.JSONField(blank=True, help_text='How far the copy to S3 has come.', null=True)),
                ('devbox', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name='executions', to='devboxes.devbox')),
                ('host', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', to='hosts.host')),
            ],
            options={
                'abstract': False,
                'indexes': [models.Index(condition=models.Q(('wake_at__isnull', False)), fields=['wake_at'], name='executions_execution_due'), models.Index(condition=models.Q(('completed_at__isnull', True)), fields=['account_id'], name='executions_open')],
                'constraints': [models.UniqueConstraint(fields=('devbox', 'command_id'), name='executions_command_once'), models.UniqueConstraint(condition=models.Q(('request_key__isnull', False)), fields=('devbox', 'request_key'), name='executions_request_once'), models.CheckConstraint(condition=models.Q(models.Q(('completed_at__isnull', False), ('exit_status__isnull', False), ('status', 'completed')), models.Q(models.Q(('status', 'completed'), _negated=True), ('completed_at__isnull', True)), _connector='OR'), name='executions_completed_has_exit')],
            },
        ),
        migrations.RunSQL(
            "ALTER TABLE executions_execution SET (fillfactor = 70)",
            "ALTER TABLE executions_execution RESET (fillfactor)",
        ),
    ]
